"""Files of a box that are safe to read and write: they end, and nobody waits for them."""

import asyncio

from hadal.sandbox import AsyncSandbox
from hadal.sandbox.results import FileStat
from hadal.tools.tool import ToolUseError

__all__ = ["check_regular", "read_regular"]

_READ_S = 60.0
"""Some files of /proc wait, and a FIFO may take the place of a file after the check."""
_OTHERS = {"directory": "directory", "fifo": "FIFO", "socket": "socket"}


def check_regular(stat: FileStat) -> None:
    """Refuse what is no regular file: a FIFO waits for somebody else, a device may have no end.

    Raises:
        ToolUseError: It is none.
    """
    if stat.kind != "file":
        kind = _OTHERS.get(stat.kind, "device")
        raise ToolUseError(f"{stat.path} is a {kind}, no regular file: use bash")


async def read_regular(
    box: AsyncSandbox, path: str, limit: int, *, user: str | None = None
) -> bytes:
    """Return the content of a regular file, which may be one of /proc with a size of 0.

    Args:
        box: Where.
        path: Of the file, or of a link to it.
        limit: Bytes it may have.
        user: Who reads it.

    Raises:
        ToolUseError: It is no regular file, has more bytes, or gives none.
        SandboxError: The box failed; SandboxFileError with the reason of the system.
    """
    stat = await box.files.stat(path)
    check_regular(stat)
    if stat.size > limit:
        raise ToolUseError(f"{path} has {stat.size:,} bytes: use bash on parts of it")
    try:
        async with asyncio.timeout(_READ_S):
            data = await box.files.read(path, length=limit + 1, user=user)
    except TimeoutError:
        raise ToolUseError(f"{path} gives nothing within {_READ_S:g} s: use bash") from None
    if len(data) > limit:
        raise ToolUseError(f"{path} has more than {limit:,} bytes: use bash on parts of it")
    return data

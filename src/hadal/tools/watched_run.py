"""A command in a box, and what it prints while it runs."""

import asyncio
import codecs
from collections.abc import Sequence

from hadal.errors import SandboxError
from hadal.sandbox import AsyncProcess, AsyncSandbox, ExecResult
from hadal.tools.tool import Said

__all__ = ["watched_run"]

_QUICK_S = 1.0
"""Commands that are done by then are not watched."""
_PAUSE_S = 0.5
"""Between two pieces."""
_SAID_BYTES = 16_000
"""Of one command; what comes after them is in its result."""


async def watched_run(
    box: AsyncSandbox, argv: Sequence[str], said: Said, *, request_id: str, timeout_s: float,
    output_limit: int,
) -> ExecResult:  # fmt: skip
    """Run a command and wait for its end, as `AsyncSandbox.run` does, with its errors.

    Args:
        box: Where.
        argv: Program and arguments.
        said: Told what it prints, the first 16,000 bytes at most, if it takes more than a second.
        request_id: Twice the same runs once.
        timeout_s: After so long all of it is killed.
        output_limit: Bytes that are kept.
    """

    async def watch() -> None:
        await asyncio.sleep(_QUICK_S)
        # The same request again: a handle on the command that runs.
        process = await box.spawn(
            argv, timeout_s=timeout_s, output_limit=output_limit, request_id=request_id
        )
        printed = _Printed()
        reading = asyncio.create_task(printed.read(process))
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=_PAUSE_S)
                if text := printed.take():
                    said(text)
            await reading
        finally:
            reading.cancel()
            await process.detach()

    watching = asyncio.create_task(watch())
    try:
        return await box.run(
            argv, timeout_s=timeout_s, output_limit=output_limit, request_id=request_id
        )
    finally:
        watching.cancel()
        [failure] = await asyncio.gather(watching, return_exceptions=True)
        # What goes wrong with the box, the command itself says.
        if failure is not None and not isinstance(failure, asyncio.CancelledError | SandboxError):
            raise failure


class _Printed:
    """What has been printed and not yet told, up to a limit."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""
        self._left = _SAID_BYTES

    async def read(self, process: AsyncProcess) -> None:
        """Take in what a command prints, until its end or the limit."""
        async for _, data in process:
            self._waiting += self._decoder.decode(data[: self._left])
            self._left -= len(data)
            if self._left <= 0:
                return

    def take(self) -> str:
        """Return what has not been told."""
        text, self._waiting = self._waiting, ""
        return text

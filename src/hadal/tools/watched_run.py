"""A command in a box, and what it prints while it runs."""

import asyncio
import codecs
import contextlib
from collections.abc import Sequence

from hadal.errors import SandboxError
from hadal.sandbox import AsyncSandbox, ExecResult
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
        teller = _Teller(said)
        try:
            async for _, data in process:
                if not teller.take(data):
                    break
            teller.tell()
        finally:
            teller.close()
            await process.detach()

    watching = asyncio.create_task(watch())
    try:
        return await box.run(
            argv, timeout_s=timeout_s, output_limit=output_limit, request_id=request_id
        )
    finally:
        watching.cancel()
        # What goes wrong with the box, the command itself says.
        with contextlib.suppress(asyncio.CancelledError, SandboxError):
            await watching


class _Teller:
    """Gathers what is printed into pieces that are not too many."""

    def __init__(self, said: Said) -> None:
        self._said = said
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""
        self._left = _SAID_BYTES
        self._timer: asyncio.TimerHandle | None = None

    def take(self, data: bytes) -> bool:
        """Take bytes in; return whether there may be more."""
        self._waiting += self._decoder.decode(data[: self._left])
        self._left -= len(data)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self.tell)
        return self._left > 0

    def tell(self) -> None:
        """Pass on what has come."""
        self.close()
        if self._waiting:
            self._said(self._waiting)
        self._waiting = ""

    def close(self) -> None:
        """Pass nothing on any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

"""Whether the processes of a box run: not while it is paused, nor while somebody works on its files."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from hadal.errors import UnsupportedError
from hadal.node.cgroups import Cgroup

__all__ = ["Stillness"]

_PATIENCE_S = 5
_POLL_S = 0.0005


class Stillness:
    """Stops a box while anybody wants that, and lets it go on when nobody does any more.

    Args:
        cgroup: Of the box.
    """

    def __init__(self, cgroup: Cgroup) -> None:
        self._cgroup = cgroup
        self._holders = 0
        self.paused = False

    @property
    def is_wanted(self) -> bool:
        """Whether somebody wants it to stand still."""
        return self.paused or self._holders > 0

    async def pause(self) -> None:
        """Stop it until `resume`, which may come before it has stopped.

        Raises:
            UnsupportedError: It does not stop; then it goes on, unless others want it still.
        """
        self.paused = True
        try:
            await self._stop()
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """End the pause. It goes on, unless somebody holds it."""
        self.paused = False
        self._go_on()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncGenerator[None]:
        """Yield while it stands still; pauses, their ends and other holders meanwhile change nothing.

        Raises:
            UnsupportedError: It does not stop.
        """
        self._holders += 1
        try:
            await self._stop()
            yield
        finally:
            self._holders -= 1
            self._go_on()

    async def _stop(self) -> None:
        self._cgroup.freeze()
        deadline = time.monotonic() + _PATIENCE_S
        # Not in one go: a box that takes long to stop must not hold up the others.
        while self.is_wanted and not self._cgroup.is_frozen():
            if time.monotonic() > deadline:
                raise UnsupportedError(
                    f"the box does not stand still within {_PATIENCE_S} s",
                    hint="a process of it waits for a device or file system that does not answer",
                )
            await asyncio.sleep(_POLL_S)

    def _go_on(self) -> None:
        if not self.is_wanted:
            with contextlib.suppress(OSError):  # it has just ended
                self._cgroup.thaw()

"""The sleep of one box: who asks something of it meanwhile ends it."""

import asyncio
from collections.abc import Callable

__all__ = ["Nap"]


class Nap:
    """From when a box is told to sleep until it runs again.

    Args:
        wake: Begins to wake it; may refuse.

    Attributes:
        sleeps: Whether no process of it is there.
        is_over: Whether somebody has asked something of it: it wakes, or is not to fall asleep.
        wakes: Whether it is being woken.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.sleeps = False
        self.is_over = False
        self.wakes = False
        self._wake = wake
        self._runs: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """See that it is soon over.

        Raises:
            NoCapacityError: There is no memory for the box; it sleeps on.
            JournalError: It cannot be written down; it sleeps on.
        """
        if self.is_over:
            return
        if self.sleeps:
            self._wake()
            self.wakes = True
        self.is_over = True

    def finish(self) -> None:
        """Say that the box runs, or is gone."""
        if not self._runs.done():
            self._runs.set_result(None)

    async def wait(self) -> None:
        """Return when the box runs, or is gone."""
        await asyncio.shield(self._runs)

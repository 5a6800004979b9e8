"""How long a model that cannot be reached is waited for."""

import asyncio
import time
from collections.abc import Callable

from hadal.errors import HadalError

__all__ = ["Patience"]

_PAUSES_S = (0.5, 15.0)
"""Between two tries to reach the model: the first, and what they grow to."""


class Patience:
    """Waits between tries, longer and longer, until it has lasted too long.

    Args:
        limit_s: Seconds without any success, at most.
        note: Told the error and the pause before it.
    """

    def __init__(self, limit_s: float, note: Callable[[str, float], None]) -> None:
        self._limit_s = limit_s
        self._note = note
        self.renew()

    def renew(self) -> None:
        """Begin anew: something has come."""
        self._pause_s, self._gone_since = _PAUSES_S[0], 0.0

    async def wait(self, error: HadalError) -> None:
        """Wait before the next try.

        Raises:
            HadalError: That error, where another try is of no use, or there were enough.
        """
        self._gone_since = self._gone_since or time.monotonic()
        gone = time.monotonic() - self._gone_since
        if not error.retryable or gone + self._pause_s > self._limit_s:
            raise error
        self._note(str(error), self._pause_s)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _PAUSES_S[1])

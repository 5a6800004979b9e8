"""Networks that are ready before anybody asks for them."""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Container

from hadal.errors import HadalError, NoCapacityError
from hadal.node.network.config import FIRST_NUMBER, NetworkConfig
from hadal.node.network.router import Router
from hadal.node.network.threads import Worker

__all__ = ["NetworkPool"]

logger = logging.getLogger(__name__)

_RETRY_S = 0.1
_NUMBERS_TRIED = 256


class NetworkPool:
    """Numbers of networks and their namespaces. A number comes back only after all others had their turn.

    Args:
        config: Settings.
        router: Makes them,
        worker: in this thread.
        adopted: Numbers that are in use already.
    """

    def __init__(
        self, config: NetworkConfig, router: Router, worker: Worker, adopted: Container[int]
    ) -> None:
        self._config = config
        self._router = router
        self._worker = worker
        numbers = range(FIRST_NUMBER, FIRST_NUMBER + config.capacity)
        self._fresh = (number for number in numbers if number not in adopted)
        self._returned: deque[int] = deque()
        self._namespaces: dict[int, int] = {}
        self._ready: asyncio.Queue[int | HadalError] = asyncio.Queue()
        self._waiting = 0
        self._low = asyncio.Event()
        self._low.set()
        self._closing = False
        self._filler = asyncio.get_running_loop().create_task(self._fill())

    async def take(self) -> tuple[int, int]:
        """Return the number of a network and the file descriptor of its namespace.

        Raises:
            NoCapacityError: No other can be made.
        """
        if self._ready.empty():
            self._waiting += 1
            self._low.set()
            try:
                ready = await self._ready.get()
            finally:
                self._waiting -= 1
        else:
            ready = self._ready.get_nowait()
            self._low.set()
        if isinstance(ready, HadalError):
            raise ready
        return ready, self._namespaces[ready]

    async def take_tap(self) -> tuple[int, int]:
        """Return the number of a network for a virtual machine and the file at the other end of its link.

        Raises:
            NoCapacityError: No other can be made.
            UnsupportedError: This kernel has no such links.
        """
        number, tap = await self._make(self._router.make_tap)
        return number, tap

    async def give_back(self, number: int) -> None:
        """End a network; with the last process in it, the kernel removes it.

        Raises:
            NodeError: The kernel refuses it.
        """
        try:
            fd = self._namespaces.pop(number, None)
            await self._worker.do(self._router.end_box, number, fd)
        finally:
            self._returned.append(number)

    async def close(self) -> None:
        """Let go of all networks, taken ones too: these stay as long as their boxes."""
        self._closing = True
        self._low.set()
        await self._filler
        for fd in self._namespaces.values():
            os.close(fd)
        self._namespaces.clear()

    async def _fill(self) -> None:
        """Keep networks ready, and tell those who wait for one when none can be made."""
        while not self._closing:
            await self._low.wait()
            self._low.clear()
            while not self._closing and self._is_low():
                try:
                    number, fd = await self._make(self._router.make_box)
                    self._namespaces[number] = fd
                    self._ready.put_nowait(number)
                except HadalError as error:
                    logger.warning("no network made", extra={"reason": error.message})
                    for _ in range(self._waiting):
                        self._ready.put_nowait(error)
                    await asyncio.sleep(_RETRY_S)

    def _is_low(self) -> bool:
        return self._ready.qsize() < max(self._config.pool, self._waiting)

    async def _make(self, make: Callable[[int], int | None]) -> tuple[int, int]:
        for _ in range(_NUMBERS_TRIED):
            number = next(self._fresh, None)
            if number is None and self._returned:
                number = self._returned.popleft()
            if number is None:
                break
            fd = await self._worker.do(make, number)
            if fd is not None:
                return number, fd
            self._returned.append(number)  # the kernel has not yet removed its last user
        raise NoCapacityError(
            f"all {self._config.capacity} networks of {self._config.boxes} are in use",
            hint="configure a larger range for boxes",
        )

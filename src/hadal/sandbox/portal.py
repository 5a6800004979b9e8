"""One event loop in a thread of its own, for callers without one, or with one that must not wait."""

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from hadal.sandbox.client import close_all

__all__ = ["call", "iterate"]

T = TypeVar("T")


class _Portal:
    """The loop; made when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the running loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=self._loop.run_forever, name="hadal-sandbox", daemon=True
                )
                thread.start()
            return self._loop

    def forget(self) -> None:
        """In a forked child: threads are not inherited."""
        self._lock = threading.Lock()
        self._loop = None

    def close(self) -> None:
        """At the end of the process: close the connections that nobody has closed."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(close_all(self._loop), self._loop).result(timeout=5)


_portal = _Portal()
atexit.register(_portal.close)
os.register_at_fork(after_in_child=_portal.forget)


def call(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop and wait for it; an interrupt ends it there too."""
    future = asyncio.run_coroutine_threadsafe(work, _portal.loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """Yield what an asynchronous iterator yields."""
    end = object()

    async def following() -> T | object:
        return await anext(items, end)

    while (item := call(following())) is not end:
        yield item  # pyright: ignore[reportReturnType]

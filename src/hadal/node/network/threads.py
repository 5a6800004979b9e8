"""Threads that work in one network namespace, for the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from hadal.errors import NodeError
from hadal.node.faults import reach

__all__ = ["Worker"]

P = ParamSpec("P")
R = TypeVar("R")


class Worker:
    """One thread that does one thing after the other, in the order asked for.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)

    async def do(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in the thread. It is called to its end even when nobody waits any more.

        Raises:
            NodeError: The system refused something.
        """
        work = partial(_run, partial(function, *args, **kwargs))
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(_seen)
        try:
            return await asyncio.shield(future)
        except OSError as error:
            raise NodeError(f"network of a box: {error}") from error

    def close(self) -> None:
        """End the thread when it has done what it was asked for."""
        self._executor.shutdown()


def _run(function: Callable[[], R]) -> R:
    reach("network: before a step")
    result = function()
    reach("network: after a step")
    return result


def _seen(future: asyncio.Future[R]) -> None:
    """Where nobody waits any more, nobody is told what failed."""
    if not future.cancelled():
        future.exception()

"""The server and the workers of a demonstration, as processes: the same programs that users start."""

import asyncio
import ctypes
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from hadal.errors import HadalError
from hadal.tasks import Task

__all__ = ["Worker", "start_server"]

_SERVING = re.compile(rb"serving .* at (http://\S+)/v1")
_LOAD_S = 120
"""Seconds until a server must have loaded its model."""
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """So that a demonstration that is killed leaves no server behind (prctl(2))."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def _start(*arguments: str, log: Path) -> asyncio.subprocess.Process:
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hadal", *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip


async def _stop(process: asyncio.subprocess.Process, kind: signal.Signals) -> None:
    """End a process, with all that it has started."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
    await process.wait()


@asynccontextmanager
async def start_server(model: str, log: Path) -> AsyncGenerator[str]:
    """Run `hadal serve` on a free port, and give its URL.

    Args:
        model: What it serves.
        log: File for what it says.

    Raises:
        HadalError: It ended, or does not come up.
    """
    process = await _start("serve", model, "--port", "0", log=log)
    try:
        yield await asyncio.wait_for(_serving(process, log), _LOAD_S)
    except TimeoutError:
        raise HadalError(f"the server has not come up in {_LOAD_S} s", hint=f"see {log}") from None
    finally:
        await _stop(process, signal.SIGKILL)


async def _serving(process: asyncio.subprocess.Process, log: Path) -> str:
    while True:
        said = log.read_bytes()
        found = _SERVING.search(said)
        if found is not None:
            return found.group(1).decode()
        if process.returncode is not None:
            raise HadalError(
                f"the server ended with {process.returncode}: {said[-500:].decode(errors='replace')}"
            )
        await asyncio.sleep(0.05)


class Worker:
    """A process that does some tasks, one after another.

    Args:
        number: Its name.
        tasks: That it does.
        command: Arguments of `hadal` before those that name the tasks.
        log: File for what it says.
    """

    def __init__(
        self, number: int, tasks: Sequence[Task], command: Sequence[str], log: Path
    ) -> None:
        self.number = number
        self.tasks = tuple(tasks)
        self._command = [*command, *(part for t in tasks for part in ("--task", t.name))]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it; after a kill it goes on where it was."""
        self._process = await _start(*self._command, log=self._log)

    async def kill(self) -> None:
        """Kill it as `kill -9` does."""
        assert self._process is not None
        await _stop(self._process, signal.SIGKILL)

    async def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            await _stop(self._process, signal.SIGTERM)

    @property
    def running(self) -> bool:
        """Return whether it runs."""
        return self._process is not None and self._process.returncode is None

    def check(self, over: Collection[str] | None = None) -> None:
        """See that it has not failed.

        Args:
            over: Names of tasks with an outcome, once it has ended: all of its own must be among them.

        Raises:
            HadalError: It ended with an error, or without an outcome.
        """
        code = self._process.returncode if self._process is not None else None
        left = [task.name for task in self.tasks if over is not None and task.name not in over]
        if left or code not in (None, 0, 3):  # 3: a void task, which its journal tells
            tail = self._log.read_bytes()[-500:].decode(errors="replace")
            without = f" without an outcome of {', '.join(left)}" if left else ""
            raise HadalError(f"worker {self.number} ended with {code}{without}: {tail}")

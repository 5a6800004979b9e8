"""Several agents at work, one of them killed on the way and gone on with, and what came of it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from hadal.demo.processes import Worker, start_server
from hadal.demo.progress import Progress
from hadal.errors import HadalError
from hadal.evals import TaskResult, journal_path, read_result
from hadal.tasks import Task, named_task

__all__ = ["Board", "DemoReport", "Kill", "run_demo"]

_LOOK_S = 0.2
_TASK_S = 300
"""Seconds in which some task must come to an end, or something hangs."""


@dataclass(frozen=True)
class Kill:
    """A worker that was killed.

    Attributes:
        worker: Its number.
        task: What it was doing.
        results, tokens: Calls that had come back, and tokens of the reply that was being written.
        journal: What was written down by then.
    """

    worker: int
    task: str
    results: int
    tokens: int
    journal: bytes


@dataclass(frozen=True)
class DemoReport:
    """What came of it.

    Attributes:
        results: Of the tasks.
        kill: The worker that was killed; None if the tasks were over too soon.
        kept: Whether all that it had written down is still there, and more after it.
        load_s, seconds: Until the model was loaded, and for all tasks.
        folder: With the journals.
    """

    results: tuple[TaskResult, ...]
    kill: Kill | None
    kept: bool
    load_s: float
    seconds: float
    folder: Path


Board = Callable[[Sequence[Worker], Progress, str], None]
"""Shows how things stand, and what has just happened."""


async def run_demo(
    tasks: Sequence[Task], folder: Path, *, model: str, workers: int, board: Board
) -> DemoReport:
    """Let workers do tasks with one model between them, kill one of them, and start it again.

    Args:
        tasks: What is to be done.
        folder: For journals and logs.
        model: A checkpoint.
        workers: Processes.
        board: Shown how things stand.

    Raises:
        HadalError: A process failed or hangs.
    """
    began = time.monotonic()
    progress = Progress(tasks, folder)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(start_server(model, folder / "server.log"))
        loaded = time.monotonic()
        command = (
            "eval", "--model", url, "--tokenizer", model, "--into", str(folder), "--at-once", "1",
        )  # fmt: skip
        crew = [
            Worker(n + 1, tasks[n::workers], command, folder / f"worker-{n + 1}.log")
            for n in range(min(workers, len(tasks)))
        ]
        for worker in crew:
            stack.push_async_callback(worker.stop)
            await worker.start()
        kill = await _watch(crew, progress, folder, board)
    results = [read_result(task, journal_path(folder, task)) for task in tasks]
    kept = kill is not None and _went_on(kill, folder)
    return DemoReport(
        tuple(results), kill, kept, loaded - began, time.monotonic() - loaded, folder
    )  # fmt: skip


def _went_on(kill: Kill, folder: Path) -> bool:
    now = _journal(folder, kill.task).read_bytes()
    return now.startswith(kill.journal) and len(now) > len(kill.journal)


def _journal(folder: Path, task: str) -> Path:
    return journal_path(folder, named_task(task))


async def _watch(
    crew: Sequence[Worker], progress: Progress, folder: Path, board: Board
) -> Kill | None:
    """Look on until all workers are through; kill one of them in the middle of a reply."""
    kill: Kill | None = None
    moved = time.monotonic()
    while any(worker.running for worker in crew):
        await asyncio.sleep(_LOOK_S)
        for worker in crew:
            worker.check()
        said = ""
        for name in progress.update():
            moved = time.monotonic()
            said += f"{name}: {progress.states[name].shown}\n"
        victim = None if kill is not None else _victim(crew, progress)
        if victim is not None:
            worker, task = victim
            await worker.kill()
            progress.update()
            state = progress.states[task]
            whole = _journal(folder, task).read_bytes().rpartition(b"\n")[0]
            kill = Kill(worker.number, task, state.results, state.pending, whole)
            said += f"worker {worker.number} was killed (kill -9) in the middle of {task}\n"
            board(crew, progress, said)
            await worker.start()
            said = f"worker {worker.number} was started again\n"
        board(crew, progress, said)
        if time.monotonic() - moved > _TASK_S:
            raise HadalError(f"no task has ended in {_TASK_S} s", hint=f"see the logs in {folder}")
    board(crew, progress, "".join(f"{n}: {progress.states[n].shown}\n" for n in progress.update()))
    for worker in crew:
        worker.check(over={name for name, state in progress.states.items() if state.over})
    return kill


def _victim(crew: Sequence[Worker], progress: Progress) -> tuple[Worker, str] | None:
    """Return a worker that is in the middle of a reply, after a call of it has come back."""
    for worker in crew:
        for task in worker.tasks:
            state = progress.states[task.name]
            if not state.over and state.results and state.pending:
                return worker, task.name
    return None

"""`hadal demo`: agents at work, on the network that comes with the package."""

import asyncio
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hadal.cli.run import runs_folder
from hadal.errors import ConfigError
from hadal.plain_text import visible

if TYPE_CHECKING:
    from hadal.demo import DemoReport
    from hadal.demo.processes import Worker
    from hadal.demo.progress import Progress
    from hadal.tasks import Task

__all__ = ["demo"]

_FIRST_SEED = 20_000
"""Of the tasks, apart from those that docs/nano.md reports on."""


def demo(
    *,
    model: str = "nano",
    tasks: int = 16,
    workers: int = 4,
    seed: int = 0,
    into: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Let several agents solve tasks in real boxes, kill one of them on the way, and go on with it.

    The network is one of V4's architecture that this project trained; its server, the agents and the boxes
    are started for the demonstration and end with it. The folder of the runs is left, and for a while the daemon of the
    boxes, until it has been idle.

    Examples:
        hadal demo

        hadal demo --tasks 35 --workers 8 --seed 7

    Args:
        model: A checkpoint's folder.
        tasks: How many, each of another family; none was seen in training.
        workers: Agents at a time, each a process.
        seed: For other tasks.
        into: Folder of the runs; a new one. Default: beside those of `hadal run`.
        json_output: Print the outcome as JSON.
    """
    from hadal.demo import run_demo

    if tasks < 1 or workers < 1:
        raise ConfigError(f"expected at least one task and one worker, got {tasks} and {workers}")
    folder = into or runs_folder().parent / "demo" / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", hint="name another folder with --into")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=json_output, highlight=False)
    chosen = _choose(tasks, _FIRST_SEED + seed)
    console.print(f"{len(chosen)} tasks that {model} has not seen, {workers} agents, one of which will be killed")  # fmt: skip
    # A request to end is an interrupt: what was started is ended first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        board = _Board(live, console)
        report = asyncio.run(run_demo(chosen, folder, model=model, workers=workers, board=board))
    _show(console, report)
    if json_output:
        found = {
            "results": [asdict(r) for r in report.results], "killed": report.kill and report.kill.task,
            "kept": report.kept, "load_s": report.load_s, "seconds": report.seconds, "runs": str(folder),
        }  # fmt: skip
        print(json.dumps(found))  # noqa: T201 - data goes to stdout
    changed = report.kill is not None and not report.kept
    sys.exit(3 if changed or any(r.outcome == "void" for r in report.results) else 0)


def _choose(count: int, seed: int) -> list["Task"]:
    """Return tasks of as many families as there is room for, from all levels."""
    from hadal.tasks import FAMILIES, UNSEEN, make_task

    families = [*FAMILIES, *UNSEEN]
    step = max(1.0, len(families) / count)
    spread = [families[int(n * step) % len(families)] for n in range(count)]
    return [make_task(family, "test", seed + n) for n, family in enumerate(spread)]


class _Board:
    """Shows how things stand: live on a terminal, else a line for everything that happens."""

    def __init__(self, live: Live, console: Console) -> None:
        self._live = live
        self._console = console

    def __call__(self, crew: Sequence["Worker"], progress: "Progress", said: str) -> None:
        if said:
            self._console.print(Text(said.rstrip("\n")))
        table = Table("agent", "task", "turn", "is doing", box=None)
        for worker in crew:
            left = [t for t in worker.tasks if not progress.states[t.name].over]
            name = left[0].family if left else "through"
            state = progress.states[left[0].name] if left else None
            doing = state.shown if state else ""
            table.add_row(
                str(worker.number), name, str(state.turns + 1) if state else "", Text(doing)
            )
        over = [state for state in progress.states.values() if state.over]
        solved = sum(state.score == 1 for state in over)
        summary = Text(f"solved {solved} of {len(over)}, {len(progress.states) - len(over)} to go")
        self._live.update(Group(table, summary))


def _show(console: Console, report: "DemoReport") -> None:
    from hadal.tasks import UNSEEN

    table = Table("level", "family", "solved", "turns", "tokens", "seconds", "prompt", "from the cache", box=None)  # fmt: skip
    for result in sorted(report.results, key=lambda r: (r.level, r.family)):
        name = f"{result.family} (not trained on)" if result.family in UNSEEN else result.family
        solved = {1: "yes", 0: "no", None: "void"}[result.score]
        share = (
            f"{result.cached_tokens:,} ({result.cached_tokens / max(1, result.prompt_tokens):.0%})"
        )
        table.add_row(
            str(result.level), name, solved, str(result.turns), f"{result.reply_tokens:,}",
            f"{result.seconds:.1f}", f"{result.prompt_tokens:,}", share,
        )  # fmt: skip
    console.print(table)
    solved = sum(r.solved for r in report.results)
    tokens = sum(r.reply_tokens for r in report.results)
    prompts = sum(r.prompt_tokens for r in report.results)
    saved = sum(r.cached_tokens for r in report.results) / max(1, prompts)
    for why in sorted({r.detail for r in report.results if r.outcome == "void"}):
        console.print(
            Text(f"void: {visible(why)}; `hadal doctor` says what boxes miss", style="red")
        )
    console.print(
        f"solved {solved} of {len(report.results)} in {report.seconds:.0f} s (and {report.load_s:.0f} s to load); "
        f"{tokens:,} tokens said; {saved:.0%} of all prompt tokens came from the prefix cache"
    )
    kill = report.kill
    if kill is None:
        console.print("no agent was killed: the tasks were over too soon")
    else:
        kept = "everything written down was kept" if report.kept else "ITS JOURNAL HAS CHANGED"
        console.print(
            f"agent {kill.worker} was killed in the middle of {kill.task}, after {kill.results} commands and "
            f"{kill.tokens} tokens of a reply, and went on from there: {kept}"
        )
    _show_next(console, report.folder)


def _show_next(console: Console, folder: Path) -> None:
    """Say what can be done now, as it can be pasted."""
    yours = folder / "yours"
    yours.mkdir(exist_ok=True)
    (yours / "moon.txt").write_text("mare\nsea\ntide\n")
    task = "hadal run 'Write the number of lines of moon.txt to sun.txt'"
    for title, command in (
        ("look at all of it:", f"hadal view {shlex.quote(str(folder))}"),
        ("give it a task:", f"{task} --mount {shlex.quote(str(yours))}:/data:rw --working-dir /data"),
        ("serve it to any client:", "hadal serve nano"),
    ):  # fmt: skip
        shown = f"{_program()}{command.removeprefix('hadal')}"
        console.print(f"\n{title}")
        console.print(Text(f"  {shown}", style="bold"), soft_wrap=True)


def _program() -> str:
    """Return how this program is called from here."""
    path = Path(sys.executable).with_name("hadal")
    if shutil.which("hadal") == str(path) or not path.exists():
        return "hadal"
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))

"""`hadal runs`: what agents did."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from hadal.cli.run import runs_folder
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app"]

app = App(name="runs", help="What agents did: list, show, export.")
_Json = Annotated[bool, Parameter(name="--json", negative="")]


@app.command(name="ls")
def list_runs(*, runs: Path | None = None, json_output: _Json = False) -> None:
    """List runs, the newest first.

    Examples:
        hadal runs ls

        hadal runs ls --runs results --json

    Args:
        runs: Their folder. Default: where `hadal run` keeps them.
        json_output: Print one JSON object a line.
    """
    from hadal.agent import read_events

    folder = runs or runs_folder()
    paths = sorted(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime, reverse=True)
    rows = [_row(path.stem, read_events(path)) for path in paths]
    if json_output:
        for row in rows:
            print(json.dumps(row))  # noqa: T201 - data goes to stdout
        return
    table = Table("run", "state", "turns", "tokens", "task", box=None)
    for row in rows:
        table.add_row(
            row["id"], row["state"], str(row["turns"]), f"{row['tokens']:,}", row["task"][:60]
        )
    Console().print(table)


def _row(name: str, events: "Sequence[dict[str, Any]]") -> dict[str, Any]:
    from hadal.agent import Trajectory

    trajectory = Trajectory.of(events)
    said = next((e["text"] for e in events if e["kind"] == "user"), "")
    ending = trajectory.ending
    return {
        "id": name,
        "state": "not ended" if ending is None else str(ending.reason),
        "turns": trajectory.turns,
        "tokens": len(trajectory.ids),
        "task": said,
    }


@app.command
def show(run: str, *, runs: Path | None = None) -> None:
    """Show a run as `hadal run` showed it.

    Args:
        run: Its id.
        runs: Folder of the runs.
    """
    from hadal.agent import read_events
    from hadal.agent.terminal import show_event

    console = Console(highlight=False)
    for event in read_events(_path(run, runs)):
        show_event(console, event)


@app.command
def export(run: str, *, runs: Path | None = None, model: str | None = None) -> None:
    """Print a run as ATIF v1.8, the trajectory format of Harbor.

    Examples:
        hadal runs export 3f2a91c04d7b > trajectory.json

    Args:
        run: Its id.
        runs: Folder of the runs.
        model: Name of the model, to go into it.
    """
    from hadal.agent import read_events
    from hadal.agent.atif import to_atif

    found = to_atif(read_events(_path(run, runs)), run, model_name=model)
    print(json.dumps(found))  # noqa: T201 - data goes to stdout


def _path(run: str, runs: Path | None) -> Path:
    path = (runs or runs_folder()) / f"{run}.jsonl"
    if not path.exists():
        raise ConfigError(f"there is no run {run} in {path.parent}", hint="hadal runs ls")
    return path

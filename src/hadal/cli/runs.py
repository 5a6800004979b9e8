"""`hadal runs`: what agents did."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hadal.cli.run import runs_folder
from hadal.plain_text import one_line

if TYPE_CHECKING:
    from hadal.agent.run_files import RunFiles

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
    rows = _files(runs).rows()
    if json_output:
        for row in rows:
            print(json.dumps(row))  # noqa: T201 - data goes to stdout
        return
    table = Table("run", "state", "turns", "tokens", "task", box=None)
    for row in rows:
        table.add_row(
            row["id"],
            row["state"],
            str(row["turns"]),
            f"{row['tokens']:,}",
            Text(one_line(row["task"], 60)),
        )
    Console().print(table)


@app.command
def show(run: str, *, runs: Path | None = None, json_output: _Json = False) -> None:
    """Show a run as `hadal run` showed it.

    Examples:
        hadal runs show 3f2a91c04d7b

        hadal runs show 3f2a91c04d7b --json | jq .kind

    Args:
        run: Its id.
        runs: Folder of the runs.
        json_output: Print every event as a line of JSON.
    """
    from hadal.agent.terminal import show_event

    console = Console(highlight=False)
    for event in _files(runs).events(run):
        if json_output:
            print(json.dumps(event))  # noqa: T201 - data goes to stdout
        else:
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
    from hadal.agent.atif import to_atif

    found = to_atif(_files(runs).events(run), run, model_name=model)
    print(json.dumps(found))  # noqa: T201 - data goes to stdout


def _files(runs: Path | None) -> "RunFiles":
    from hadal.agent.run_files import RunFiles

    return RunFiles(runs or runs_folder())

"""`hadal doctor`: what this machine can do for boxes, and how to get the rest."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hadal.node.doctor import Finding, Verdict

__all__ = ["doctor"]

_STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}


def doctor(
    *,
    state: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Probe this machine for boxes by doing what they need. Exit code 1: containers do not work.

    Nothing is left behind. Yellow lines are about things that boxes do without.

    Examples:
        hadal doctor

    Args:
        state: Folder where boxes would be. Default: that of the embedded node.
        json_output: Print one JSON object.
    """
    from hadal.node.doctor import examine, verdicts
    from hadal.sandbox.embedded import state_folder

    findings = examine(state or state_folder())
    judged = verdicts(findings)
    if json_output:
        body = {
            "findings": [asdict(finding) | {"ok": finding.ok} for finding in findings],
            "backends": [asdict(verdict) for verdict in judged],
        }
        sys.stdout.write(json.dumps(body) + "\n")
    else:
        _show(findings, judged)
    if not judged[0].works:
        sys.exit(1)


def _show(findings: "list[Finding]", judged: "list[Verdict]") -> None:
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        what = Text(finding.detail)
        if finding.fix:
            what.append(f"\nget it: {finding.fix}", style="dim")
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), Text(finding.name), what)
    console.print(table)
    for verdict in judged:
        style = "green" if verdict.text == "works" else "yellow" if verdict.works else "red"
        console.print(Text(f"{verdict.backend}: {verdict.text}", style=style))

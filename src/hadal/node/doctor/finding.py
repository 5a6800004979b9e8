"""What a probe has found, and how one runs its risky part in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

__all__ = ["Attempt", "Finding", "attempt", "run_tool"]

_LIMIT_S = 20.0
"""Of what takes a tenth of a second on a machine that has nothing else to do."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was probed.
        state: "ok", "limited" (some things do without, or better with more) or "missing".
        detail: What was seen.
        fix: How to get it, or "".
    """

    name: str
    state: Literal["ok", "limited", "missing"]
    detail: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is all there."""
        return self.state == "ok"


@dataclass(frozen=True)
class Attempt:
    """How something went that was done for trial.

    Attributes:
        ok: Whether it worked.
        detail: What was seen, or why it did not.
    """

    ok: bool
    detail: str


def attempt(name: str, *arguments: str, limit_s: float = _LIMIT_S) -> Attempt:
    """Do something of `attempts` in a child, so that nothing of it changes or hangs this process."""
    command = [sys.executable, "-m", "hadal.node.doctor.attempts", name, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, cwd="/",
    )  # fmt: skip
    try:
        said, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Attempt(ok=False, detail=f"no answer within {limit_s:.0f} s")
    try:
        body = json.loads(said)
        return Attempt(ok=bool(body["ok"]), detail=str(body["detail"]))
    except (ValueError, KeyError):
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return Attempt(ok=False, detail=f"the probe failed ({process.returncode}): {last[0]}")


def run_tool(*command: str, stdin: str = "", limit_s: float = _LIMIT_S) -> Attempt:
    """Run a program of the system and return the first line of what it says."""
    try:
        result = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=limit_s, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Attempt(ok=False, detail=str(error))
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return Attempt(ok=False, detail=lines[-1])
    return Attempt(ok=True, detail=(result.stdout.strip().splitlines() or [""])[0])

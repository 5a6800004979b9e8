"""Runs in a folder: what the list says of each, and one of them whole."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hadal.agent.atif import to_atif
from hadal.agent.journal import Journal, locked_inodes, read_events
from hadal.agent.stop import Outcome
from hadal.agent.trajectory import Trajectory, last_score
from hadal.errors import ConfigError, StorageError

__all__ = ["RunFiles"]

RUNNING, INTERRUPTED = "running", "interrupted"
"""States of runs without an ending: a process works on it, or none does."""
_LONGEST_TASK = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class RunFiles:
    """The journals of a folder. A row is read again only when its file has changed.

    Args:
        folder: With `*.jsonl` in it.

    Raises:
        ConfigError: There is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"there is no folder {folder}",
                hint="hadal run makes one; or name another with its path",
            )
        self._folder = folder
        self._rows: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def rows(self) -> list[dict[str, Any]]:
        """Return what the list says, the newest first; a journal that cannot be read says why."""
        found: list[dict[str, Any]] = []
        locked = locked_inodes()
        for path, stat in self._newest_first():
            version = (stat.st_mtime_ns, stat.st_size)
            known = self._rows.get(path.stem)
            if known is None or known[0] != version:
                known = self._rows[path.stem] = (version, _row(path))
            row = known[1]
            if row["state"] == RUNNING and stat.st_ino not in locked:
                row = row | {"state": INTERRUPTED}
            found.append(row)
        return found

    def _newest_first(self) -> list[tuple[Path, os.stat_result]]:
        found: list[tuple[Path, os.stat_result]] = []
        for path in self._folder.glob("*.jsonl"):
            with suppress(FileNotFoundError):  # it went while we looked
                found.append((path, path.stat()))
        return sorted(found, key=lambda pair: -pair[1].st_mtime_ns)

    def take_up(self, command: str) -> Journal | None:
        """Open the newest run of a command that is not finished, and that nobody runs.

        Args:
            command: As the run's first event has it.

        Raises:
            StorageError: It cannot be opened.
        """
        for path, _ in self._newest_first():
            if _command(path) != command:
                continue
            try:
                journal = Journal(path)
            except ConfigError:  # it is run
                continue
            ending = Trajectory.of(journal.events).ending
            is_left = any(event["kind"] == "abandoned" for event in journal.events)
            if not is_left and (ending is None or ending.reason.is_ours):
                return journal
            journal.close()
        return None

    def path(self, run: str) -> Path:
        """Return the journal of a run.

        Raises:
            ConfigError: There is no such run.
        """
        path = self._folder / f"{run}.jsonl"
        if not _NAME.fullmatch(run) or not path.is_file():
            raise ConfigError(
                f"there is no run {run} in {self._folder}", hint="`hadal runs ls` lists them"
            )
        return path

    def version(self, run: str) -> tuple[int, int, bool]:
        """Return when the journal of a run was written to last (ns), its bytes, and whether it is open.

        Raises:
            ConfigError: There is no such run.
        """
        stat = self.path(run).stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino in locked_inodes()

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return the events of a run.

        Raises:
            ConfigError: There is no such run.
            StorageError: It cannot be read.
        """
        return read_events(self.path(run))

    def tokens(self, run: str, step: int) -> dict[str, Any]:
        """Return what the model said in a step, token by token.

        Args:
            run: Which.
            step: Its number in `whole`.

        Returns:
            `said`: for each piece its token ids, its text, and log-probabilities where they were kept.

        Raises:
            ConfigError: There is no such run, or the model said nothing in that step.
            StorageError: It cannot be read.
        """
        count, said = 0, list[dict[str, Any]]()
        for event in self.events(run):
            match event["kind"]:
                case "prompt":
                    said = []
                case "tokens":
                    said.append({k: event[k] for k in ("ids", "text", "logprobs") if k in event})
                case "start" | "user" | "reply":
                    count += 1
                    if count == step and event["kind"] == "reply":
                        return {"said": said}
                case _:
                    pass
        raise ConfigError(f"the model said nothing in step {step} of {run}")

    def whole(self, run: str) -> dict[str, Any]:
        """Return a run as ATIF, without token ids: they grow with the square of the turns.

        Where it has no reason to have stopped, `extra` says whether it runs or was interrupted.

        Raises:
            ConfigError, StorageError: As `events`.
        """
        *_, goes_on = self.version(run)
        found = to_atif(self.events(run), run, token_ids=False)
        if found["extra"].get("outcome") == Outcome.VOID:
            found["extra"].setdefault("stop_reason", Outcome.VOID)
        elif found["extra"].get("stop_reason") is None:
            found["extra"]["state"] = RUNNING if goes_on else INTERRUPTED
        return found


def _command(path: Path) -> str | None:
    with (
        suppress(OSError, ValueError),
        path.open("rb") as file,
    ):  # then it is nobody's to go on with
        first: Any = json.loads(file.readline(_LONGEST_TASK))
        return first.get("command") if isinstance(first, dict) else None
    return None


def _row(path: Path) -> dict[str, Any]:
    try:
        events = read_events(path)
    except StorageError as error:
        return _fields(path.stem, error.message, "void", None, 0, 0, path.stem)
    try:
        trajectory = Trajectory.of(events)
    except (KeyError, ValueError, AssertionError) as error:
        return _fields(path.stem, f"not a run: {error!r:.200}", "void", None, 0, 0, path.stem)
    ending = trajectory.ending
    last = last_score(events)
    score = None if last is None else last["score"]
    outcome = None if ending is None else str(ending.outcome)
    state = RUNNING if ending is None else str(ending.reason)
    if (
        last is not None and score is None
    ):  # what failed was ours: before the loop, in it, or after it
        outcome, state = str(Outcome.VOID), str(Outcome.VOID) if ending is None else state
    return _fields(
        path.stem, state, outcome, score, trajectory.turns, len(trajectory.ids), _task(events),
    )  # fmt: skip


def _fields(
    name: str,
    state: str,
    outcome: str | None,
    score: int | None,
    turns: int,
    tokens: int,
    task: str,
) -> dict[str, Any]:
    return {
        "id": name, "state": state, "outcome": outcome, "score": score, "turns": turns, "tokens": tokens,
        "task": task[:500],
    }  # fmt: skip


def _task(events: Sequence[dict[str, Any]]) -> str:
    return next((e["text"] for e in events if e["kind"] in ("task", "user")), "")

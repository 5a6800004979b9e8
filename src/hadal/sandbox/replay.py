"""A recorded session, done again in another box, with every difference.

The same log on a fresh box of the same image should give the same: where it does not, the session depended on
time, chance, the network, or the order of what ran at the same time.
"""

import base64
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hadal.errors import HadalError, SandboxFileError
from hadal.sandbox.results import Change, ExecResult
from hadal.sandbox.trajectory import Logged, read_log

if TYPE_CHECKING:
    from hadal.sandbox.box import AsyncSandbox

__all__ = ["Difference", "ReplayReport", "replay"]


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        position: Of the record; 0 for a file at the end.
        what: What differs.
        subject: The command, or the path.
        recorded: What was.
        replayed: What is.
    """

    position: int
    what: Literal["exit_code", "stdout", "stderr", "error", "file"]
    subject: str
    recorded: str
    replayed: str


@dataclass(frozen=True)
class ReplayReport:
    """What came of a replay.

    Attributes:
        steps: Records that were done again.
        skipped: Positions of records that cannot be: not completed ones, forks, snapshots.
        compared_files: Files whose content was compared at the end.
        differences: All of them.
    """

    steps: int
    skipped: tuple[int, ...]
    compared_files: int
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


async def replay(
    recorded: "AsyncSandbox", box: "AsyncSandbox", *, before: int | None = None
) -> ReplayReport:
    """Do what is in the log of one box again in another, one after the other, and compare.

    Args:
        recorded: Whose log it is. Where it still lives, the files that it has changed are compared too.
        box: A fresh one, of the same image; of any backend.
        before: Position of the first step that is left out; files are not compared then.

    Raises:
        HadalError: The log cannot be read, or the box fails; a failing step is a difference, not an error.
    """
    log = await read_log(recorded.client, recorded.id)
    if before is not None:
        log = [record for record in log if record.position < before]
    differences: list[Difference] = []
    skipped: list[int] = []
    for record in log:
        if record.kind not in ("command", "write", "change") or record.state == "begun":
            skipped.append(record.position)
        elif record.kind == "command":
            differences += await _command(recorded, box, record)
        else:
            differences += await _file_operation(recorded, box, record)
    compared, files = (0, []) if before is not None else await _files(recorded, box)
    return ReplayReport(
        len(log) - len(skipped), tuple(skipped), compared, tuple(differences + files)
    )


async def _command(source: "AsyncSandbox", box: "AsyncSandbox", record: Logged) -> list[Difference]:
    body = {k: v for k, v in record.request.items() if k != "stdin"}
    if "stdin" in record.request:
        content = await source.blob(record.request["stdin"])
        body["stdin"] = base64.b64encode(content).decode()
    if body.pop("interactive", False) or body.pop("tty", None):
        return [_difference(record, "error", "was interactive", "its input is not recorded")]
    try:
        before: ExecResult | str = await _recorded_result(source, record)
    except HadalError as error:
        before = error.code
    try:
        after: ExecResult | str = await box.perform(body, None)
    except HadalError as error:
        after = error.code
    if isinstance(before, str) or isinstance(after, str):
        one = before if isinstance(before, str) else before.describe()
        other = after if isinstance(after, str) else after.describe()
        return [] if one == other else [_difference(record, "error", one, other)]
    found: list[Difference] = []
    if before.exit_code != after.exit_code:
        found.append(_difference(record, "exit_code", before.exit_code, after.exit_code))
    if before.stdout_bytes != after.stdout_bytes:
        found.append(_difference(record, "stdout", before.stdout, after.stdout))
    if before.stderr_bytes != after.stderr_bytes:
        found.append(_difference(record, "stderr", before.stderr, after.stderr))
    return found


async def _recorded_result(source: "AsyncSandbox", record: Logged) -> ExecResult:
    result = record.outcome()
    assert result is not None
    kept = {"stdout": result.stdout_bytes, "stderr": result.stderr_bytes}
    for name in kept:
        blob = (record.result or {}).get(f"{name}_blob")
        if blob is not None:
            kept[name] = await source.blob(blob)
    return dataclasses.replace(result, stdout_bytes=kept["stdout"], stderr_bytes=kept["stderr"])


async def _file_operation(
    source: "AsyncSandbox", box: "AsyncSandbox", record: Logged
) -> list[Difference]:
    before = (record.result or {}).get("errno", 0) if record.state == "done" else record.state
    try:
        await box.files.repeat(record.kind, record.request, source)
        after: object = 0
    except SandboxFileError as error:
        after = error.errno
    return [] if before == after else [_difference(record, "error", before, after)]


def _difference(
    record: Logged,
    what: Literal["exit_code", "stdout", "stderr", "error"],
    before: object,
    after: object,
) -> Difference:
    subject = (
        record.request.get("shell") or record.request.get("argv") or record.request.get("path")
    )
    return Difference(record.position, what, str(subject)[:200], str(before), str(after))


async def _files(recorded: "AsyncSandbox", box: "AsyncSandbox") -> tuple[int, list[Difference]]:
    try:
        before = {change.path: change for change in await recorded.changes()}
    except HadalError:
        return 0, []  # it is gone: only its log is left
    after = {change.path: change for change in await box.changes()}
    found = [
        Difference(0, "file", path, _content(before.get(path)), _content(after.get(path)))
        for path in sorted(before.keys() | after.keys())
        if _content(before.get(path)) != _content(after.get(path))
    ]
    return len(before.keys() | after.keys()), [d for d in found if d.subject not in _OWN]


_OWN = ("/etc/hostname", "/etc/hosts", "/etc/machine-id")
"""Files that name the box itself."""


def _content(change: Change | None) -> str:
    if change is None:
        return "unchanged"
    return hashlib.sha256(
        json.dumps([change.kind, change.mode, change.size, change.digest]).encode()
    ).hexdigest()

"""A command of a box: while it runs, and what is written down of its end."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hadal.errors import CommandRefusedError, SandboxFileError, UnknownOutcomeError
from hadal.node.blobs import Blobs
from hadal.node.guest_command import Exit, GuestCommand
from hadal.node.journal import Record
from hadal.node.output import Output
from hadal.node.wire import Tag, TimedOut, decode_fields
from hadal.sandbox.results import ExecResult

__all__ = [
    "Command",
    "file_error",
    "recorded_result",
    "refusal_of",
    "result_fields",
    "result_of",
]


class Command:
    """A command of a box, from its record in the journal on.

    Attributes:
        position: Its number in the log.
        output: What it writes.
        result: Done when its end is written down; or the error that kept it from running.
    """

    def __init__(self, position: int, output: Output, guest: GuestCommand | None) -> None:
        self.position = position
        self.output = output
        self.guest = guest
        self.result: asyncio.Future[ExecResult] = asyncio.get_running_loop().create_future()
        self.unwritten: Callable[[], None] | None = None
        """Writes its end down again, where the disk was full."""

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.output.finish()
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # whoever waits sees it; nobody has to


def recorded_result(record: Record, blobs: Blobs) -> ExecResult:
    """Return the result that the journal has of a command."""
    fields: dict[str, Any] = dict(record.event.result or {})
    streams: dict[str, bytes] = {"stdout": record.stdout, "stderr": record.stderr}
    for name in streams:
        reference = fields.pop(f"{name}_blob", None)
        if reference is not None:
            streams[name] = blobs.read(reference)
    return ExecResult(
        **fields,
        stdout_bytes=streams["stdout"],
        stderr_bytes=streams["stderr"],
        id=record.event.position,
        recorded=True,
    )


def refusal_of(record: Record) -> Exception:
    """Return the error of a record that is not the result of a command."""
    result = record.event.result or {}
    if record.event.state == "refused":
        errno = result.get("errno", 0)
        return CommandRefusedError(
            str(result.get("message", "it was not started")),
            errno=errno if isinstance(errno, int) else 0,
        )
    what = json.dumps(record.event.request)[:200]
    return UnknownOutcomeError(
        f"step {record.event.position} of box {record.box}: whether {record.event.kind} {what} was done"
        " is not known",
        hint="look at the box, then go on with another request id; or start again from a snapshot",
    )


def file_error(ended: Exit, stderr: bytes, arguments: Sequence[str | bytes]) -> SandboxFileError:
    """Return the error of an operation on files that the guest could not do."""
    path = os.fsdecode(arguments[1]) if len(arguments) > 1 else ""
    try:
        errno = int.from_bytes(decode_fields(stderr)[Tag.ERRNO][:4], "little")
    except (ValueError, KeyError):
        errno = 5  # it was killed: an I/O error like any other
    return SandboxFileError(errno or 5, path)


def result_of(ended: Exit, oom: bool, stdout: bytes, stderr: bytes, position: int) -> ExecResult:
    """Return the result of a command that the guest says has ended."""
    by_signal = os.WIFSIGNALED(ended.status)
    number = os.WTERMSIG(ended.status) if by_signal else None
    code = 128 + number if number is not None else os.WEXITSTATUS(ended.status)
    late: Literal["time", "quiet"] | None = None
    if ended.timed_out is not TimedOut.NO:
        late = "time" if ended.timed_out is TimedOut.LIFE else "quiet"
    return ExecResult(
        exit_code=code,
        stdout_bytes=stdout,
        stderr_bytes=stderr,
        signal=number,
        timed_out=late,
        oom_killed=oom and code != 0,
        truncated=len(stdout) < ended.stdout_bytes or len(stderr) < ended.stderr_bytes,
        stdout_total=ended.stdout_bytes,
        stderr_total=ended.stderr_bytes,
        duration_s=(ended.ended_ns - ended.started_ns) / 1e9,
        cpu_s=(ended.user_us + ended.system_us) / 1e6,
        max_rss_kb=ended.max_rss_kb,
        id=position,
    )


def result_fields(result: ExecResult) -> dict[str, Any]:
    """Return what the journal keeps of a result beside its output."""
    return {
        "exit_code": result.exit_code,
        "signal": result.signal,
        "timed_out": result.timed_out,
        "oom_killed": result.oom_killed,
        "truncated": result.truncated,
        "stdout_total": result.stdout_total,
        "stderr_total": result.stderr_total,
        "duration_s": result.duration_s,
        "cpu_s": result.cpu_s,
        "max_rss_kb": result.max_rss_kb,
    }

"""What comes back from a box."""

import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from hadal.errors import CallFailedError

__all__ = [
    "BoxInfo",
    "CallResult",
    "Change",
    "Event",
    "ExecResult",
    "FileEvent",
    "FileStat",
    "NodeStatus",
    "Usage",
]


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """A command that has ended. A failure is a value: nothing is raised for it unless asked for.

    Attributes:
        exit_code: 0 to 255; 128 + the signal where one ended it, as shells say it.
        stdout_bytes, stderr_bytes: Its output. With a terminal all of it is in stdout.
        signal: Number of the signal that ended it, or None.
        timed_out: "time" or "quiet" where it was killed because it took too long, or said nothing for
            too long.
        oom_killed: Whether the box's memory ran out while it ran, and it or a part of it was killed.
        truncated: Whether output is missing: beyond the limit only the beginning and the end are kept.
        stdout_total, stderr_total: Bytes that it wrote, kept or not.
        duration_s: From its start to its end, by the clock of the box.
        cpu_s: Processor time of it and of what it waited for.
        max_rss_kb: Largest memory of one of its processes.
        id: Its number in the log of the box.
        recorded: Whether this came from the log instead of being run now.
    """

    exit_code: int
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    signal: int | None = None
    timed_out: Literal["time", "quiet"] | None = None
    oom_killed: bool = False
    truncated: bool = False
    stdout_total: int = 0
    stderr_total: int = 0
    duration_s: float = 0.0
    cpu_s: float = 0.0
    max_rss_kb: int = 0
    id: int = 0
    recorded: bool = False

    @property
    def stdout(self) -> str:
        """Standard output as UTF-8; what is none is replaced."""
        return self.stdout_bytes.decode("utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as UTF-8; what is none is replaced."""
        return self.stderr_bytes.decode("utf-8", errors="replace")

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.exit_code == 0 and self.timed_out is None

    def describe(self) -> str:
        """Return how it ended, in words."""
        if self.timed_out == "time":
            return f"timed out after {self.duration_s:.1f} s"
        if self.timed_out == "quiet":
            return f"killed after {self.duration_s:.1f} s: no output for too long"
        if self.oom_killed and self.exit_code:
            return f"exit code {self.exit_code}: the box ran out of memory"
        if self.signal is not None:
            return f"ended by {signal.Signals(self.signal).name}"
        return f"exit code {self.exit_code}"


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """A call that has ended.

    Attributes:
        returned: What it returned, from JSON; None where it failed, or was pickled.
        pickle: What it returned, pickled. It comes from a box: unpickle it in a box.
        error: Class of the exception that ended it; `CallEnded` where its process ended without one.
        message, trace: Of the exception.
        stdout_bytes, stderr_bytes: What it wrote, up to 1 MiB each.
        timed_out: Whether its time was over.
        duration_s: Of the call in its box.
        recorded: Whether this came from the log.
    """

    returned: object = None
    pickle: bytes | None = None
    error: str | None = None
    message: str = ""
    trace: str = ""
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    timed_out: bool = False
    duration_s: float = 0.0
    recorded: bool = False

    @property
    def ok(self) -> bool:
        """Whether it returned."""
        return self.error is None

    @property
    def stdout(self) -> str:
        """Standard output as UTF-8; what is none is replaced."""
        return self.stdout_bytes.decode("utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as UTF-8; what is none is replaced."""
        return self.stderr_bytes.decode("utf-8", errors="replace")

    @property
    def value(self) -> Any:
        """What it returned.

        Raises:
            CallFailedError: It did not return.
        """
        if self.error is not None:
            raise CallFailedError(f"{self.error}: {self.message}", result=self)
        return self.returned


@dataclass(frozen=True, kw_only=True)
class FileStat:
    """A file in a box.

    Attributes:
        path: As asked for, or relative to the listed directory.
        kind: What it is.
        size: Bytes.
        mode: Permission bits.
        uid, gid: Owner, in the box.
        mtime_ns, ctime_ns: Last change of content and of anything, ns since 1970.
        target: Of a symbolic link.
    """

    path: str
    kind: Literal["file", "directory", "symlink", "fifo", "socket", "char", "block"]
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    ctime_ns: int
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """A path that a box has changed against its image.

    Attributes:
        path: In the box.
        kind: "written", "removed", or "replaced" for a directory that hides all of the image's.
        directory: Whether it is one.
        mode: Permission bits.
        size: Bytes of a file.
        digest: sha256 of a file's content, or of a link's target, in hex. Where the holes of sparse files
            in a list are more than 2 GiB, `sparse:` and sha256 of the size (decimal, then a newline) and of
            each block of 4 KiB that is not zeros, behind its offset (8 bytes, little-endian).
        changed_ns: When, ns since 1970.
    """

    path: str
    kind: Literal["written", "removed", "replaced"]
    directory: bool
    mode: int
    size: int
    digest: str | None
    changed_ns: int


@dataclass(frozen=True, kw_only=True)
class FileEvent:
    """Something that happened in a watched directory.

    Attributes:
        kind: What.
        name: Of the file in it; empty for the directory itself.
    """

    kind: Literal[
        "created", "deleted", "modified", "closed", "moved_from", "moved_to", "attributes", "gone"
    ]
    name: str


@dataclass(frozen=True, kw_only=True)
class BoxInfo:
    """A box as its node sees it.

    Attributes:
        id: Its name on the node, and in the log.
        state: "running", "paused" or "gone".
        cause: Why it is gone.
        backend: How it is made.
        image: What it was made from.
        name, trajectory: Given by the caller.
        created_ns, used_ns: Since 1970.
        capabilities: What its backend can do.
    """

    id: str
    state: Literal["creating", "running", "paused", "gone"]
    cause: str | None
    backend: str
    image: str
    name: str | None
    trajectory: str | None
    created_ns: int
    used_ns: int
    capabilities: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a box uses now.

    Attributes:
        memory_bytes: With page cache.
        memory_limit_bytes: What it may.
        cpu_s: Processor time since its start.
        pids: Processes and threads.
        disk_bytes: On its disk: what it has written and kept.
        oom_kills: Processes killed for memory.
    """

    memory_bytes: int
    memory_limit_bytes: int
    cpu_s: float
    pids: int
    disk_bytes: int
    oom_kills: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """One record of a box's log.

    Attributes:
        position: Its number, from 1, without gaps.
        kind: "command", "write", "remove", ...
        request: What was asked, as JSON; large content by digest.
        digest: Of the request: equal requests have equal digests.
        state: "begun" (its end is not known yet), "done", "refused" (it was not run) or "unknown".
        began_ns, ended_ns: Since 1970, by the node's clock.
        result: As JSON; None while it is not known.
    """

    position: int
    kind: str
    request: dict[str, object]
    digest: str
    state: Literal["begun", "done", "refused", "unknown"]
    began_ns: int
    ended_ns: int | None
    result: dict[str, object] | None


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """What a node daemon says of itself.

    Attributes:
        name: Of the node on its machine.
        version: Of hadal there.
        pid: Of the daemon.
        state: Its folder.
        boxes, max_boxes: That live now, and may.
        memory_mb, max_memory_mb: MiB that they may use now, each by its limit, and that all may; None for any.
        cgroups: How limits are set: "v1", "v2" or "hybrid".
        uptime_s: Since the daemon was started.
    """

    name: str
    version: str
    pid: int
    state: str
    boxes: int
    max_boxes: int
    memory_mb: int
    max_memory_mb: int | None
    cgroups: str
    uptime_s: float

"""Limits and accounts of boxes: control groups of version 1, 2, or both side by side.

Version 1 has one tree for each controller; a box gets a directory in each. Version 2 has one tree. On a
hybrid host the controllers that matter may be on either, and each is used where it is.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import UnsupportedError

__all__ = ["BoxLimits", "Cgroup", "Cgroups"]

_WANTED = ("memory", "cpu", "pids", "freezer")
_PERIOD_US = 100_000


@dataclass(frozen=True, kw_only=True)
class BoxLimits:
    """What a box may use: bytes of memory, processors, processes."""

    memory_bytes: int
    cpus: float
    pids: int


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii")


def _write(path: Path, value: object) -> None:
    # One write(2): cgroup files take a value whole or not at all.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _count(text: str, name: str) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


class Cgroup:
    """The groups of one box."""

    def __init__(self, folders: dict[str, Path], unified: Path | None) -> None:
        self._folders = folders
        self._unified = unified

    def _at(self, controller: str) -> Path:
        return self._folders[controller]

    def _is_v2(self, controller: str) -> bool:
        return self._folders[controller] == self._unified

    @property
    def folders(self) -> Sequence[Path]:
        """Every directory, once."""
        return list(dict.fromkeys(self._folders.values()))

    @property
    def procs(self) -> tuple[Path, ...]:
        """The files in which the init of the box writes itself."""
        return tuple(folder / "cgroup.procs" for folder in self.folders)

    def create(self, limits: BoxLimits) -> None:
        """Make the directories and set the limits.

        Raises:
            UnsupportedError: They cannot be made or set here.
        """
        try:
            for folder in self.folders:
                folder.mkdir(exist_ok=True)
            self.limit(limits)
        except OSError as error:
            raise UnsupportedError(
                f"cannot limit a box: {error}", hint="`hadal doctor` says what is missing"
            ) from error

    def limit(self, limits: BoxLimits) -> None:
        """Set other limits while it runs."""
        memory, cpu = self._at("memory"), self._at("cpu")
        quota = max(1000, round(limits.cpus * _PERIOD_US))
        if self._is_v2("memory"):
            _write(memory / "memory.max", limits.memory_bytes)
            if (memory / "memory.swap.max").exists():
                _write(memory / "memory.swap.max", 0)
            _write(memory / "memory.oom.group", 0)
        else:
            _write(memory / "memory.limit_in_bytes", limits.memory_bytes)
            sockets = memory / "memory.kmem.tcp.limit_in_bytes"
            if sockets.exists():  # version 1 counts buffers of sockets only where they are limited
                _write(sockets, min(limits.memory_bytes, max(1 << 22, limits.memory_bytes // 4)))
            with_swap = memory / "memory.memsw.limit_in_bytes"
            if with_swap.exists():
                _write(with_swap, limits.memory_bytes)
        if self._is_v2("cpu"):
            _write(cpu / "cpu.max", f"{quota} {_PERIOD_US}")
        else:
            _write(cpu / "cpu.cfs_quota_us", quota)
        # One more than asked for: the init is none of the caller's.
        _write(self._at("pids") / "pids.max", limits.pids + 1)

    def oom_kills(self) -> int:
        """Return how many of its processes were killed for memory."""
        folder = self._at("memory")
        name = "memory.events" if self._is_v2("memory") else "memory.oom_control"
        return _count(_read(folder / name), "oom_kill")

    def memory_bytes(self) -> int:
        """Return the memory that it has now."""
        folder = self._at("memory")
        name = "memory.current" if self._is_v2("memory") else "memory.usage_in_bytes"
        return int(_read(folder / name))

    def reclaim(self) -> None:
        """Let the kernel take of its memory what it can: what files have too, and what fits into swap. It may take long."""
        folder = self._at("memory")
        with contextlib.suppress(OSError):  # it could not take all, or the box has just ended
            if not self._is_v2("memory"):
                _write(folder / "memory.force_empty", 0)
                return
            swap = folder / "memory.swap.max"
            if swap.exists():
                _write(swap, "max")
            try:
                _write(folder / "memory.reclaim", self.memory_bytes())
            finally:
                if swap.exists():
                    _write(swap, 0)  # what is there stays there until it is used

    def cpu_s(self) -> float:
        """Return its processor time."""
        if "cpuacct" in self._folders:
            return int(_read(self._at("cpuacct") / "cpuacct.usage")) / 1e9
        return _count(_read(self._at("cpu") / "cpu.stat"), "usage_usec") / 1e6

    def pids(self) -> int:
        """Return how many processes and threads it has."""
        return int(_read(self._at("pids") / "pids.current"))

    def processes(self) -> list[int]:
        """Return its processes, as the host numbers them."""
        return [int(pid) for pid in _read(self._at("pids") / "cgroup.procs").split()]

    def freeze(self) -> None:
        """Begin to stop all of it; `is_frozen` says when it stands still."""
        folder = self._at("freezer")
        if self._is_v2("freezer"):
            _write(folder / "cgroup.freeze", 1)
        else:
            _write(folder / "freezer.state", "FROZEN")

    def is_frozen(self) -> bool:
        """Return whether all of it stands still."""
        folder = self._at("freezer")
        if self._is_v2("freezer"):
            return "frozen 1" in _read(folder / "cgroup.events")
        return _read(folder / "freezer.state").strip() == "FROZEN"

    def thaw(self) -> None:
        """Let all of it go on, at once."""
        folder = self._at("freezer")
        if self._is_v2("freezer"):
            _write(folder / "cgroup.freeze", 0)
        else:
            _write(folder / "freezer.state", "THAWED")

    def remove(self) -> bool:
        """Remove the directories; False while processes are left in them."""
        for folder in self.folders:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno == errno.EBUSY:
                    return False
                raise
        return True


class Cgroups:
    """The groups of a node.

    Args:
        name: Of the node: its directory under `hadal`, so that two nodes share a machine.
        root: Where the hierarchies are mounted.

    Raises:
        UnsupportedError: A controller that boxes need is not there or not writable.
    """

    def __init__(self, name: str, root: Path = Path("/sys/fs/cgroup")) -> None:
        self._parents: dict[str, Path] = {}
        self._unified: Path | None = None
        unified = next(
            (p for p in (root, root / "unified") if (p / "cgroup.controllers").exists()), None
        )
        available = set(_read(unified / "cgroup.controllers").split()) if unified else set[str]()
        for controller in (*_WANTED, "cpuacct"):
            if (root / controller / "cgroup.procs").exists():
                self._parents[controller] = root / controller / "hadal" / name
            elif unified and (controller in available or controller == "freezer"):
                self._parents[controller] = unified / "hadal" / name
        missing = [c for c in _WANTED if c not in self._parents]
        if missing:
            raise UnsupportedError(
                f"no control group for {', '.join(missing)} under {root}",
                hint="mount cgroup2 at /sys/fs/cgroup, or run the node where it is delegated",
            )
        if unified and unified / "hadal" / name in self._parents.values():
            self._unified = unified / "hadal" / name
        try:
            self._prepare(unified)
        except OSError as error:
            raise UnsupportedError(f"control groups cannot be made: {error}") from error

    def _prepare(self, unified: Path | None) -> None:
        wanted = [c for c, p in self._parents.items() if p == self._unified and c != "freezer"]
        if self._unified is not None and unified is not None and wanted:
            line = " ".join(f"+{c}" for c in wanted)
            self._unified.mkdir(parents=True, exist_ok=True)
            for folder in (unified, self._unified.parent, self._unified):
                _write(folder / "cgroup.subtree_control", line)
        for parent in set(self._parents.values()):
            parent.mkdir(parents=True, exist_ok=True)

    @property
    def layout(self) -> str:
        """Where the controllers are: "v1", "v2" or "hybrid"."""
        kinds = {self._parents[c] == self._unified for c in _WANTED}
        return "hybrid" if len(kinds) == 2 else "v2" if kinds == {True} else "v1"

    def of(self, box: str) -> Cgroup:
        """Return the groups of a box, whether they are there or not."""
        unified = None if self._unified is None else self._unified / box
        return Cgroup({c: parent / box for c, parent in self._parents.items()}, unified)

    def remove(self) -> None:
        """Remove the node's own directories, if no box is left in them."""
        for parent in set(self._parents.values()):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def boxes(self) -> set[str]:
        """Return the names that have a group."""
        return {
            entry.name
            for parent in self._parents.values()
            if parent.exists()
            for entry in parent.iterdir()
            if entry.is_dir()
        }

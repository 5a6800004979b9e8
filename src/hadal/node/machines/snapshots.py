"""Machines as they were at one moment: their memory, the state of their devices, and their disk.

A snapshot is a folder. Its disk is a chain of files in `disks/`, the lowest first: a raw one, which the first
machine of a template wrote, and above it, in QEMU's qcow2, what each later one has changed of the one below.
Boxes and snapshots share these files by hard links: each has all that it stands on, and none has to be kept
for the sake of another.

A template is a snapshot of a machine that had just booted, when its guest had answered and before it was
told who it is. `whole.json` is written last and has the digests of the others: what does not fit is made anew.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import NodeError, UnsupportedError
from hadal.node.machines.jail_files import open_file
from hadal.node.machines.memory import load_memory
from hadal.node.sparse import copy_file, copy_not_zero, data_of, not_zero

__all__ = [
    "Overlays",
    "Snapshot",
    "Templates",
    "copy_written",
    "is_whole",
    "link_disks",
    "save_disk",
    "save_machine",
    "seal",
]

_LOG = logging.getLogger(__name__)
_WHOLE = "whole.json"
_CHAIN_MAX = 64
_KNOWN_MAX = 4096
_known: dict[tuple[int, ...], str] = {}
"""Digests of files as they were: device, inode, size and time of the last write."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in use.

    Attributes:
        folder: With `devices` and `disks`.
        memory: Descriptor of its memory.
        own: Whether one machine alone starts from it, once, so that its memory may be written.
    """

    folder: Path
    memory: int
    own: bool = False

    @property
    def devices(self) -> Path:
        """The file with the state of its devices."""
        return self.folder / "devices"

    @property
    def disks(self) -> Path:
        """The folder with its disk."""
        return self.folder / "disks"


def link_disks(source: Path, target: Path) -> int:
    """Put a chain of files into a new folder, and return how many they are.

    Raises:
        UnsupportedError: They are too many.
        OSError: The folder cannot be made.
    """
    target.mkdir(parents=True, mode=0o700)
    count = len(list(source.iterdir()))
    if count > _CHAIN_MAX:
        raise UnsupportedError(
            f"a machine that stands on {count} others, one above the other",
            hint="copy its files into a new one",
        )
    for number in range(count):
        os.link(source / str(number), target / str(number))
    return count


def save_machine(box: Path, target: Path) -> None:
    """Copy disk and devices of a machine that stands still and has written them.

    Args:
        box: Folder of its box.
        target: A new folder.

    Raises:
        UnsupportedError: It stands on too many others.
        OSError: The disk is full, or something cannot be read.
    """
    target.mkdir(parents=True, mode=0o700)
    copy_written(box / "vm/devices", target / "devices")
    save_disk(box, target / "disks")


def save_disk(box: Path, target: Path) -> None:
    """Copy the disk of a machine that stands still.

    Args:
        box: Folder of its box.
        target: A new folder, for a chain of files.

    Raises:
        UnsupportedError: It stands on too many others.
        OSError: The disk is full, or something cannot be read.
    """
    top = target / str(link_disks(box / "disks", target))
    copy_written(box / "vm/disk", top)
    top.chmod(0o444)


def copy_written(source: Path, target: Path) -> None:
    """Copy what a hypervisor has written, and nothing that it leads to.

    Raises:
        NodeError: It is no file.
        OSError: The disk is full, or it cannot be read.
    """
    file = open_file(source)
    try:
        copy_file(file, target)
    finally:
        os.close(file)


class Overlays:
    """Makes the disks of machines that start from others: empty, above what they start from."""

    def __init__(self) -> None:
        self._empty: dict[int, tuple[int, list[tuple[int, bytes]]]] = {}
        self._lock = threading.Lock()

    def make(self, below: Path, path: Path) -> None:
        """Make a file above a chain of files.

        Args:
            below: Their folder.
            path: Of the new one.

        Raises:
            UnsupportedError: This host has no qemu-img.
            OSError: It cannot be written.
        """
        size = (below / "0").stat().st_size
        with self._lock:
            if size not in self._empty:
                self._empty[size] = _empty_overlay(size, path)
        length, parts = self._empty[size]
        with path.open("xb") as file:
            file.truncate(length)
            for offset, data in parts:
                os.pwrite(file.fileno(), data, offset)


def _empty_overlay(size: int, path: Path) -> tuple[int, list[tuple[int, bytes]]]:
    """Return length and content of an overlay for a disk of some size, of which nothing is changed."""
    part = path.with_suffix(".empty")
    call = ["qemu-img", "create", "-q", "-f", "qcow2", part, str(size)]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NodeError(f"qemu-img cannot make a disk: {done.stderr.strip()[:500]}")
        with part.open("rb") as file:
            data = [(a, os.pread(file.fileno(), b - a, a)) for a, b in data_of(file.fileno())]
            return os.fstat(file.fileno()).st_size, data
    except FileNotFoundError as error:
        hint = "Debian: apt-get install qemu-utils"
        raise UnsupportedError("no qemu-img to make disks with", hint=hint) from error
    finally:
        part.unlink(missing_ok=True)


class Templates:
    """The templates of a node. For use by one thread at a time.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: dict[str, Snapshot] = {}

    def find(self, key: str) -> Snapshot | None:
        """Return a template; None where there is none that is whole.

        Raises:
            OSError: There is too little memory for it.
        """
        if key not in self._used:
            folder = self._folder / key
            if not is_whole(folder):
                return None
            self._used[key] = Snapshot(folder, load_memory(folder / "memory"))
        return self._used[key]

    def make(self, key: str, box: Path, memory: Callable[[], int]) -> None:
        """Make a template of a machine that stands still and has written its devices.

        Args:
            key: Of it.
            box: Folder of its box.
            memory: Returns the descriptor of a copy of its memory.

        Raises:
            OSError: The disk is full, or something cannot be read.
            NodeError: It is no machine.
        """
        part = self._folder / f"{key}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            save_machine(box, part)
            copy = memory()
            try:
                with (part / "memory").open("xb") as file:
                    copy_not_zero(copy, file.fileno())
                    os.fsync(file.fileno())
            finally:
                os.close(copy)
            seal(part)
            shutil.rmtree(self._folder / key, ignore_errors=True)
            part.rename(self._folder / key)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write down the digests of a snapshot that is complete.

    Raises:
        OSError: The disk is full, or a file cannot be read.
    """
    (folder / _WHOLE).write_text(json.dumps(_digests(folder)), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Return whether every file of a snapshot is as it was written."""
    try:
        if json.loads((folder / _WHOLE).read_text(encoding="utf-8")) == _digests(folder):
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        _LOG.warning("the snapshot %s cannot be read: %s", folder.name, error)
        return False
    _LOG.warning("the snapshot %s is damaged", folder.name)
    return False


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a snapshot."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != _WHOLE]
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    """Return the digest of a file: of what is in it, whether its zeros are holes or not.

    A file that nobody has written since is not read again: disks are large, and many snapshots have the same.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in _known:
            if len(_known) >= _KNOWN_MAX:
                _known.clear()
            found = hashlib.sha256(status.st_size.to_bytes(8, "little"))
            for offset, data in not_zero(file.fileno()):
                found.update(offset.to_bytes(8, "little") + len(data).to_bytes(8, "little"))
                found.update(data)
            _known[key] = found.hexdigest()
        return _known[key]

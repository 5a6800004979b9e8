"""Machines as they are right after their boot: the usual start is from one of these.

A template is a folder: the memory, the state of the devices and the disk of a machine of this kernel, image
and hardware, taken when its guest had answered and before it was told who it is. `whole.json` is written
last and has the digests of the others: what does not fit is made anew.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hadal.node.machines.memory import data_of, dump_memory, load_memory

__all__ = ["Template", "Templates", "copy_disk"]

_LOG = logging.getLogger(__name__)
_FILES = ("memory", "devices", "disk")
_WHOLE = "whole.json"


@dataclass(frozen=True)
class Template:
    """A template in use.

    Attributes:
        folder: With `devices` and `disk`.
        memory: Descriptor of its memory; of this process, for as long as it lives.
    """

    folder: Path
    memory: int


class Templates:
    """The templates of a node. For use by one thread at a time.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: dict[str, Template] = {}

    def find(self, key: str) -> Template | None:
        """Return a template; None where there is none that is whole.

        Raises:
            OSError: There is too little memory for it.
        """
        if key not in self._used:
            folder = self._folder / key
            if not _is_whole(folder):
                return None
            self._used[key] = Template(folder, load_memory(folder / "memory"))
        return self._used[key]

    def make(self, key: str, pid: int, memory: int, machine: Path) -> None:
        """Make a template of a machine that stands still and has written its devices to `devices`.

        Args:
            key: Of it.
            pid: Of its QEMU.
            memory: That it was started with.
            machine: Its folder.

        Raises:
            OSError: The disk is full, or something cannot be read.
            NodeError: The process is no machine.
        """
        part = self._folder / f"{key}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True, mode=0o700)
            dump_memory(pid, memory, part / "memory")
            shutil.copyfile(machine / "devices", part / "devices")
            copy_disk(machine / "disk", part / "disk")
            whole = {name: _digest(part / name) for name in _FILES}
            (part / _WHOLE).write_text(json.dumps(whole), encoding="utf-8")
            shutil.rmtree(self._folder / key, ignore_errors=True)
            part.rename(self._folder / key)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        whole = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))
        if whole == {name: _digest(folder / name) for name in _FILES}:
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        _LOG.warning("the template %s cannot be read: %s", folder.name, error)
        return False
    _LOG.warning("the template %s is damaged: it is made anew", folder.name)
    return False


def _digest(path: Path) -> str:
    """Return the digest of a file: of what is in it and where, not of its holes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        found.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
        for start, length in data_of(file.fileno()):
            found.update(start.to_bytes(8, "little"))
            file.seek(start)
            while length > 0 and (data := file.read(min(length, 1 << 20))):
                found.update(data)
                length -= len(data)
    return found.hexdigest()


def copy_disk(source: Path, target: Path, owner: int | None = None) -> None:
    """Copy the file of a disk, its holes too, into a new one.

    Raises:
        OSError: It cannot be read or written.
    """
    with source.open("rb") as old, target.open("xb") as new:
        os.ftruncate(new.fileno(), os.fstat(old.fileno()).st_size)
        for start, length in data_of(old.fileno()):
            at, end = start, start + length
            while at < end:
                at += os.copy_file_range(old.fileno(), new.fileno(), end - at, at, at)
        os.fchmod(new.fileno(), 0o600)
        if owner is not None:
            os.fchown(new.fileno(), owner, owner)

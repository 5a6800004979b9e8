"""What a machine that sleeps leaves in the folder of its box, beside its disk: memory and state of devices.

It wakes from that once. The files lie there as a snapshot's do, with a digest of each.
"""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import NodeError
from hadal.node.machines.memory import load_memory
from hadal.node.machines.snapshots import Snapshot, copy_written, is_whole, seal
from hadal.node.tree_removal import remove_tree

__all__ = ["Slept", "clear_folder", "forget_asleep", "opened_asleep", "save_asleep"]

_FOLDER = "asleep"


@dataclass(frozen=True, kw_only=True)
class Slept:
    """What the journal keeps of a machine that sleeps.

    Attributes:
        kind: Of its hypervisor and of what it has of hardware; only the same wakes it.
        boot_id: Of its guest.
        last_id: No command in it has had a larger number.
        known: Numbers of the commands in it.
        has_port: Whether its guest is reached through a port.
    """

    kind: str
    boot_id: str
    last_id: int
    known: list[int]
    has_port: bool


def save_asleep(box: Path, write_memory: Callable[[int], None]) -> None:
    """Keep what a machine is that stands still and has written its devices.

    Args:
        box: Folder of its box.
        write_memory: Writes its memory into an empty file, given a descriptor of that.

    Raises:
        NodeError: It is no machine.
        OSError: The disk is full, or something cannot be read.
    """
    folder = box / _FOLDER
    forget_asleep(box)  # of an attempt that failed
    folder.mkdir(mode=0o700)
    copy_written(box / "vm/devices", folder / "devices")
    with (folder / "memory").open("xb+") as file:
        write_memory(file.fileno())
        os.fsync(file.fileno())
    seal(folder)


@contextmanager
def opened_asleep(box: Path) -> Generator[Snapshot]:
    """Yield what was kept, for the machine to wake from.

    Raises:
        NodeError: It is damaged.
        OSError: There is too little memory.
    """
    folder = box / _FOLDER
    if not is_whole(folder):
        raise NodeError("what was kept of its memory is damaged")
    memory = load_memory(folder / "memory", sealed=False)
    try:
        yield Snapshot(folder, memory, own=True)
    finally:
        os.close(memory)


def forget_asleep(box: Path) -> None:
    """Remove what was kept, where there is something."""
    if (box / _FOLDER).exists():
        remove_tree(box / _FOLDER)


def clear_folder(box: Path) -> int:
    """Leave nothing of a machine in its folder but its disk, and return how many disks that stands on.

    What a hypervisor has put there may lead anywhere.
    """
    for path in (box / "vm").iterdir():
        if path.name == "disk":
            continue
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink()
    return len(list((box / "disks").iterdir()))

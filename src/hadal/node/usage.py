"""What a box uses: counted by the node's groups, or by the kernel of the box itself."""

import asyncio
from typing import Any

from hadal.node.box import Box
from hadal.node.scratch import Disks
from hadal.node.wire import Tag, decode_fields
from hadal.sandbox.specs import Capability

__all__ = ["usage_of"]


async def usage_of(box: Box, disks: Disks) -> dict[str, Any]:
    """Return the fields of a `Usage`.

    Raises:
        SandboxGoneError: The box has ended.
        SandboxFileError: A machine does not say.
    """
    if box.machine is None:
        used = _count(box, disks)
    elif Capability.COMMANDS not in box.spec.can or (box.nap is not None and box.nap.sleeps):
        used = await asyncio.to_thread(
            _count_outside, box
        )  # nobody is there, or has to wake for that
    else:
        used = await _own_count(box)
    return {"memory_limit_bytes": box.spec.memory_mb << 20, "cpu_s": box.cgroup.cpu_s(), **used}


def _count(box: Box, disks: Disks) -> dict[str, int]:
    return {
        "memory_bytes": box.cgroup.memory_bytes(),
        "pids": box.cgroup.pids() - 1,
        "disk_bytes": disks.used_bytes(box.disk),
        "oom_kills": box.cgroup.oom_kills(),
    }


def _count_outside(box: Box) -> dict[str, int]:
    """Count what the host has of a machine: which processes there are in it only its guest knows."""
    disk = (box.folder / "vm/disk").lstat().st_blocks * 512
    return {
        "memory_bytes": box.cgroup.memory_bytes(),
        "pids": 0,
        "disk_bytes": disk,
        "oom_kills": 0,
    }


async def _own_count(box: Box) -> dict[str, int]:
    fields = decode_fields(await box.applet("usage"))
    names = {"memory_bytes": Tag.SIZE, "pids": Tag.PID, "disk_bytes": Tag.LENGTH, "oom_kills": Tag.OOM_KILLS}  # fmt: skip
    return {name: int.from_bytes(fields.get(tag, b"")[:8], "little") for name, tag in names.items()}

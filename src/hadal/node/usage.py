"""What a box uses: counted by the node's groups, or by the kernel of the box itself."""

from typing import Any

from hadal.node.box import Box
from hadal.node.scratch import Disks
from hadal.node.wire import Tag, decode_fields

__all__ = ["usage_of"]


async def usage_of(box: Box, disks: Disks) -> dict[str, Any]:
    """Return the fields of a `Usage`.

    Raises:
        SandboxGoneError: The box has ended.
        SandboxFileError: A machine does not say.
    """
    used = await _own_count(box) if box.machine is not None else _count(box, disks)
    return {"memory_limit_bytes": box.spec.memory_mb << 20, "cpu_s": box.cgroup.cpu_s(), **used}


def _count(box: Box, disks: Disks) -> dict[str, int]:
    return {
        "memory_bytes": box.cgroup.memory_bytes(),
        "pids": box.cgroup.pids() - 1,
        "disk_bytes": disks.used_bytes(box.disk),
        "oom_kills": box.cgroup.oom_kills(),
    }


async def _own_count(box: Box) -> dict[str, int]:
    fields = decode_fields(await box.applet("usage"))
    names = {"memory_bytes": Tag.SIZE, "pids": Tag.PID, "disk_bytes": Tag.LENGTH, "oom_kills": Tag.OOM_KILLS}  # fmt: skip
    return {name: int.from_bytes(fields.get(tag, b"")[:8], "little") for name, tag in names.items()}

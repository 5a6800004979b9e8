"""Settings of a node."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["NodeConfig"]


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Settings of a node.

    Attributes:
        state: Folder of its journal, boxes and images.
        name: Of the node on this machine; its control groups are named after it.
        max_boxes: That live at a time.
        memory_mb: MiB that all of them may use together, each counted with its limit; None for any.
        lease_s: Seconds that boxes outlive the daemon.
        first_uid: Of the ids that boxes use on the host: 65,536 for each.
        sync: Whether every record of the journal waits for the disk.
        accelerator: Of virtual machines: "kvm", "tcg" (emulation), or "auto", which is KVM where it has run a guest.
        microvm: What runs microVMs: "qemu", or "firecracker", which needs KVM.
        host_mounts: File descriptor of the host's mount namespace, where this process has its own.
    """

    state: Path
    name: str = "node"
    max_boxes: int = 10_000
    memory_mb: int | None = None
    lease_s: int = 900
    first_uid: int = 1 << 20
    sync: Literal["process", "power"] = "process"
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    microvm: Literal["qemu", "firecracker"] = "qemu"
    host_mounts: int | None = None

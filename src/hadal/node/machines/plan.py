"""A machine to be: what tells whether it can start from what another one has left."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hadal.node.guest import Guest
from hadal.node.machines.qemu import BOOT, LAYERS, SEED, Hardware
from hadal.node.machines.snapshots import Snapshot
from hadal.node.network import BoxNetwork

__all__ = ["Plan", "Start"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A machine to be: equal plans are served by one template.

    Attributes:
        hypervisor: "qemu" or "firecracker".
        program: That.
        hardware: Of it.
        options: Of its first process.
        disk: Bytes and files of what it writes.
        layers: Files of its image; none where it boots from a disk image.
        kernel: That the node gives it, with an initial RAM disk; None where its disk has one.
        disk_image: Reference of that; None where it has layers.
        seed: Disk for cloud-init.
    """

    hypervisor: str
    program: str
    hardware: Hardware
    options: dict[str, int]
    disk: tuple[int, int]
    layers: tuple[Path, ...]
    kernel: tuple[Path, Path] | None
    disk_image: str | None = None
    seed: Path | None = None

    def key(self, disk: str = "") -> str:
        """Return the name of its template, and of all whose snapshots it can start from.

        Args:
            disk: Identity of the disk image that it is to boot from, where it is to boot.
        """
        about = asdict(self) | {"layers": [path.name for path in self.layers]}
        about |= {"disk_image": disk}
        files = [Path(self.program), *((self.kernel[0],) if self.kernel else ())]
        files += [Path(self.hardware.firmware)] if self.hardware.firmware else []
        known = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        about |= {"files": known}
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]

    def hardware_key(self) -> str:
        """Return the name of all machines that it can wake, whatever kernel they have booted."""
        return replace(self, options={}, kernel=None).key()

    def binds(self) -> list[tuple[Path, str, bool]]:
        """Return what its jail sees of its files."""
        found = [(path, f"{LAYERS}/{n}", True) for n, path in enumerate(self.layers)]
        if self.kernel is not None:
            found += [
                (self.kernel[0], f"{BOOT}/kernel", True),
                (self.kernel[1], f"{BOOT}/initrd", True),
            ]
        return found if self.seed is None else [*found, (self.seed, SEED, True)]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one machine starts with.

    Attributes:
        plan: Of it.
        folder: Of it, on the host.
        below: How many disks its own stands on.
        snapshot: That it starts from; None where it boots.
        network: Of it.
        pid: Of the first process of its jail.
        owner: Id on the host of the user who is its hypervisor.
        guest: In it, where it has slept and goes on; None where it is another machine.
        about_to_run: Called when it has been restored and nothing of it has run; with `pid`.
    """

    plan: Plan
    folder: Path
    below: int
    snapshot: Snapshot | None
    network: BoxNetwork
    pid: int
    owner: int
    guest: Guest | None = None
    about_to_run: Callable[[int], None] | None = None

    def note(self) -> None:
        """Say that it is about to run."""
        if self.about_to_run is not None:
            self.about_to_run(self.pid)

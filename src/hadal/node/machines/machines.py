"""The machines of a node: what all of them need, made once, and each one started."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from hadal.errors import LaunchError
from hadal.node.guest import Guest, GuestLostError
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore, ResolvedImage
from hadal.node.launcher import Launched, Launcher, LaunchRequest
from hadal.node.machines.initramfs import make_initramfs
from hadal.node.machines.kernel import Kernel, find_kernel
from hadal.node.machines.machine import (
    USER,
    Machine,
    hardware_of,
    measure_tsc_khz,
    settle,
    start_machine,
)
from hadal.node.machines.qemu import BOOT, FOLDER, LAYERS, qemu_program
from hadal.node.scratch import Disks
from hadal.sandbox.specs import MicroVMSpec

__all__ = ["MEMORY_OF_QEMU_MB", "Machines", "kernel_folder"]

MEMORY_OF_QEMU_MB = 192
"""Beside that of the machine: QEMU's own, with what it translates."""
_JAIL_BYTES = 1 << 20
_JAIL_INODES = 256


def kernel_folder(state: Path) -> Path:
    """Return where a node has a kernel of its own, below its state folder."""
    return state / "machines" / "kernel"


class Machines:
    """Starts machines and finds them again.

    Args:
        folder: For what all need: an initial RAM disk for each kernel, and `kernel/`, one of the user's.
        images: Where roots come from.
        launcher: Makes jails.
        disks: Formats what machines write.
    """

    def __init__(self, folder: Path, images: ImageStore, launcher: Launcher, disks: Disks) -> None:
        self._folder = folder
        self._images = images
        self._launcher = launcher
        self._disks = disks
        self._tsc_khz: int | None = None
        self._ramdisks: dict[Kernel, Path] = {}

    async def start(
        self, spec: MicroVMSpec, root: ResolvedImage, folder: Path, jail: LaunchRequest, etc: dict[str, bytes],
    ) -> tuple[Launched, Guest, Machine]:  # fmt: skip
        """Start a machine in a jail and give it its identity.

        Args:
            spec: What was asked for.
            root: Its image, in use.
            folder: Of the box.
            jail: How the box around QEMU is made, but for what QEMU needs in it.
            etc: Files of the machine in /etc.

        Raises:
            ImageError: Its image is not of the kind that machines have.
            UnsupportedError: This host has no QEMU or no kernel for it.
            LaunchError: It does not start.
        """
        layers = self._images.disks_of(root)
        program = qemu_program()
        kernel = find_kernel(kernel_folder(self._folder.parent))
        ramdisk, tsc_khz = await asyncio.to_thread(self._prepare, kernel)
        machine = folder / "vm"
        await asyncio.to_thread(self._make_folder, machine, spec)
        files = [*layers, kernel.image, ramdisk]
        places = [f"{LAYERS}/{n}" for n in range(len(layers))] + [
            f"{BOOT}/kernel",
            f"{BOOT}/initrd",
        ]
        async with self._images.using("host") as host:
            binds = [*host.binds, (machine, FOLDER, False)]
            binds += [(file, place, True) for file, place in zip(files, places, strict=True)]
            jail = replace(
                jail, layers=host.layers, binds=tuple(binds),
                scratch_bytes=_JAIL_BYTES, scratch_inodes=_JAIL_INODES,
            )  # fmt: skip
            launched = await self._launcher.launch(jail)
        try:
            keeper = await Guest.connect(jail.socket)
            hardware = hardware_of(spec, len(layers), tsc_khz)
            running, guest = await start_machine(
                keeper, machine, program, spec, hardware, jail.lease_s
            )
            await settle(guest, jail.hostname, etc)
        except GuestLostError as error:
            raise LaunchError(f"the machine has ended while it was started: {error}") from error
        return launched, guest, running

    async def find(self, folder: Path) -> tuple[Machine, Guest]:
        """Connect to the machine of a box that another daemon has started.

        Raises:
            GuestLostError: It is not there any more.
        """
        return await Machine.find(folder / "guest", folder / "vm")

    def _prepare(self, kernel: Kernel) -> tuple[Path, int]:
        if self._tsc_khz is None:
            self._tsc_khz = measure_tsc_khz(guest_program())
        if kernel not in self._ramdisks:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"initrd-{kernel.image.name}"
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(make_initramfs(guest_program(), kernel.needed_modules()))
            part.chmod(0o644)
            part.replace(path)
            self._ramdisks[kernel] = path
        return self._ramdisks[kernel], self._tsc_khz

    def _make_folder(self, folder: Path, spec: MicroVMSpec) -> None:
        """Make what a machine may write: QEMU's user owns it, as its jail sees it."""
        folder.mkdir(mode=0o700)
        file = os.open(folder / "disk", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._disks.format(file, spec.disk_mb << 20, spec.inodes)
            os.fchown(file, USER, USER)
        finally:
            os.close(file)
        os.chown(folder, USER, USER)

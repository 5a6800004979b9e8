"""The machines of a node: what all of them need, made once, and each one started, from a template if it can be."""

import asyncio
import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hadal.errors import LaunchError, NodeError, UnsupportedError
from hadal.node.cgroups import Cgroup
from hadal.node.faults import reach
from hadal.node.guest import Guest
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore, ResolvedImage
from hadal.node.launcher import Launched, Launcher, LaunchRequest
from hadal.node.machines.initramfs import make_initramfs
from hadal.node.machines.kept import KeptMachine, KeptMachines, is_kept
from hadal.node.machines.kernel import Kernel, find_kernel, kernel_folder
from hadal.node.machines.machine import (
    USER,
    Machine,
    hardware_of,
    measure_tsc_khz,
    settle,
    start_machine,
)
from hadal.node.machines.memory import copy_memory, empty_memory, memory_of
from hadal.node.machines.qemu import BOOT, DISKS, FOLDER, LAYERS, Hardware, qemu_call, qemu_program
from hadal.node.machines.snapshots import Overlays, Snapshot, Templates, link_disks, save_machine
from hadal.node.network import BoxNetwork
from hadal.node.scratch import Disks
from hadal.node.tree_removal import remove_tree
from hadal.sandbox.specs import MachineSpec

__all__ = ["MEMORY_OF_QEMU_MB", "Machines"]

MEMORY_OF_QEMU_MB = 192
"""Beside that of the machine: QEMU's own, with what it translates."""
_JAIL_BYTES = 1 << 20
_JAIL_INODES = 256
_TSC_ERROR = 0.002
"""Of a measurement, which takes a tenth of a second."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A machine to be: equal plans are served by one template.

    Attributes:
        program: QEMU.
        hardware: Of it.
        options: Of its first process.
        disk: Bytes and files of what it writes.
        layers, kernel, ramdisk: Files that it has.
    """

    program: str
    hardware: Hardware
    options: dict[str, int]
    disk: tuple[int, int]
    layers: tuple[Path, ...]
    kernel: Path
    ramdisk: Path

    def key(self) -> str:
        """Return the name of its template, and of all whose snapshots it can start from."""
        about = asdict(self) | {"layers": [path.name for path in self.layers]}
        files = [
            (str(p), p.stat().st_size, p.stat().st_mtime_ns)
            for p in (Path(self.program), self.kernel)
        ]
        about |= {"files": files}
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]

    def binds(self) -> list[tuple[Path, str, bool]]:
        """Return what its jail sees of its files."""
        layers = [(path, f"{LAYERS}/{n}", True) for n, path in enumerate(self.layers)]
        return [
            *layers,
            (self.kernel, f"{BOOT}/kernel", True),
            (self.ramdisk, f"{BOOT}/initrd", True),
        ]


class Machines:
    """Starts machines and finds them again.

    Args:
        folder: For what all need: templates, an initial RAM disk for each kernel, and `kernel/`, one of the
            user's.
        images: Where roots come from.
        launcher: Makes jails.
        disks: Formats what machines write.

    Attributes:
        kept: Snapshots that somebody keeps.
    """

    def __init__(self, folder: Path, images: ImageStore, launcher: Launcher, disks: Disks) -> None:
        self._folder = folder
        self._images = images
        self._launcher = launcher
        self._disks = disks
        self._tsc_khz: int | None = None
        self._ramdisks: dict[Kernel, Path] = {}
        self._templates = Templates(folder / "templates")
        self._overlays = Overlays()
        self._copies = folder / "copies"
        self.kept = KeptMachines(folder / "kept")
        self.kept.sweep()
        self._making: dict[str, asyncio.Lock] = {}
        remove_tree(self._copies)  # of a daemon that died while it made them

    async def start(
        self, spec: MachineSpec, root: ResolvedImage, folder: Path, jail: LaunchRequest, cgroup: Cgroup,
        network: BoxNetwork, snapshot: Snapshot | None = None,
    ) -> tuple[Launched, Guest, Machine]:  # fmt: skip
        """Start a machine in a jail and give it its identity.

        Args:
            spec: What was asked for.
            root: Its image, in use.
            folder: Of the box.
            jail: How the box around QEMU is made, but for what QEMU needs in it.
            cgroup: Of the box.
            network: What it gets; its `tap` stays the caller's.
            snapshot: Of a machine of this spec and image, that it starts from. Default: one that has just booted.

        Raises:
            ImageError: Its image is not of the kind that machines have.
            UnsupportedError: This host has no QEMU or no kernel for it.
            LaunchError: It does not start.
        """
        layers = self._images.disks_of(root)
        plan, key = await asyncio.to_thread(self._plan, spec, layers, jail.lease_s)
        if snapshot is not None:
            started = await self._start(plan, folder, jail, network, snapshot)
        elif spec.from_ is not None and is_kept(spec.from_):
            started = await self._start_kept(spec.from_, plan, key, folder, jail, network)
        else:
            started = await self._start_new(plan, key, folder, jail, cgroup, network)
        try:
            etc = jail.etc | {"machine-id": f"{uuid.uuid4().hex}\n".encode()}
            await settle(started[1], jail.hostname, etc, network)
        except BaseException as error:
            started[1].close()
            await started[2].close()
            if not isinstance(error, NodeError):
                raise
            raise LaunchError(f"the machine does not start: {error.message}") from error
        return started

    async def find(self, folder: Path) -> tuple[Machine, Guest]:
        """Connect to the machine of a box that another daemon has started.

        Raises:
            NodeError: It is not there any more.
        """
        return await Machine.find(folder / "guest", folder / "vm")

    @contextlib.asynccontextmanager
    async def copied(
        self, machine: Machine, guest: Guest, cgroup: Cgroup, init: int
    ) -> AsyncGenerator[Snapshot]:
        """Yield a machine as it is now, for others to start from; it goes on meanwhile.

        Args:
            machine: That.
            guest: In it.
            cgroup: Of its box.
            init: First process of that.

        Raises:
            NodeError: It does not stand still, or the disk is full.
            UnsupportedError: It stands on too many others.
        """
        folder, memory = self._copies / uuid.uuid4().hex, None
        try:
            async with machine.still(guest):
                reach("machine.still")
                await machine.monitor.save_devices(f"{FOLDER}/devices")
                pid = _qemu_of(cgroup, init)
                memory = await asyncio.to_thread(_copy, pid, machine.folder.parent, folder)
            reach("machine.copied")
            yield Snapshot(folder, memory)
        except OSError as error:
            raise NodeError(
                f"cannot copy the machine {machine.folder.parent.name}: {error.strerror}",
                hint="free space on the node's disk, or memory",
            ) from error
        finally:
            if memory is not None:
                os.close(memory)
            await asyncio.to_thread(remove_tree, folder)

    def _plan(self, spec: MachineSpec, layers: Sequence[Path], lease_s: int) -> tuple[_Plan, str]:
        program, kernel = qemu_program(), find_kernel(kernel_folder(self._folder.parent))
        if self._tsc_khz is None:
            self._tsc_khz = self._find_tsc_khz()
        if kernel not in self._ramdisks:
            self._ramdisks[kernel] = self._make_ramdisk(kernel)
        count = len(layers)
        plan = _Plan(
            program=program,
            hardware=hardware_of(spec, count, self._tsc_khz),
            options={"layers": count, "pids": spec.pids, "shm_mb": spec.shm_mb, "lease_s": lease_s},
            disk=(spec.disk_mb << 20, spec.inodes),
            layers=tuple(layers),
            kernel=kernel.image,
            ramdisk=self._ramdisks[kernel],
        )
        return plan, plan.key()

    def _find_tsc_khz(self) -> int:
        """Return the frequency of this host's counter: as measured first, for as long as that may be it.

        Machines that were started with one go on with it: it must not differ by the error of a measurement.
        """
        measured, path = measure_tsc_khz(guest_program()), self._folder / "tsc_khz"
        try:
            before = int(path.read_text(encoding="ascii"))
            if abs(measured - before) <= before * _TSC_ERROR:
                return before
        except (FileNotFoundError, ValueError):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(measured), encoding="ascii")
        return measured

    def _make_ramdisk(self, kernel: Kernel) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        content = make_initramfs(guest_program(), kernel.needed_modules())
        path = self._folder / f"initrd-{hashlib.sha256(content).hexdigest()[:16]}"  # part of a key
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.chmod(0o644)
        part.replace(path)
        return path

    async def _start_kept(
        self, reference: str, plan: _Plan, key: str, folder: Path, jail: LaunchRequest, network: BoxNetwork
    ) -> tuple[Launched, Guest, Machine]:  # fmt: skip
        about = await asyncio.to_thread(self.kept.about, reference)
        if about.kind != key:
            raise UnsupportedError(
                f"{reference} cannot go on here: it was kept by another QEMU, or with another kernel or lease",
                hint="start anew from a snapshot of its files",
            )
        with contextlib.ExitStack() as stack:
            snapshot = await asyncio.to_thread(stack.enter_context, self.kept.opened(reference))
            return await self._start(plan, folder, jail, network, snapshot)

    async def _start_new(
        self, plan: _Plan, key: str, folder: Path, jail: LaunchRequest, cgroup: Cgroup, network: BoxNetwork
    ) -> tuple[Launched, Guest, Machine]:  # fmt: skip
        async with self._making.setdefault(key, asyncio.Lock()):
            template = await asyncio.to_thread(self._templates.find, key)
            if template is None:
                return await self._boot(plan, key, folder, jail, cgroup, network)
        return await self._start(plan, folder, jail, network, template)

    def about(self, spec: MachineSpec, root: ResolvedImage, lease_s: int) -> KeptMachine:
        """Return what is to be known of a machine that is kept, but for its reference and size.

        Args:
            spec: Of it.
            root: Its image.
            lease_s: Seconds that it outlives the daemon.
        """
        _, kind = self._plan(spec, self._images.disks_of(root), lease_s)
        fields = spec.model_dump(mode="json", by_alias=True)
        return KeptMachine("", fields, root.digest or root.name, kind, time.time_ns(), 0)

    async def _boot(
        self,
        plan: _Plan,
        key: str,
        folder: Path,
        jail: LaunchRequest,
        cgroup: Cgroup,
        network: BoxNetwork,
    ) -> tuple[Launched, Guest, Machine]:
        """Boot a machine, and make a template of it before it goes on."""
        memory = empty_memory(plan.hardware.memory_mb << 20)
        try:
            started = await self._start(plan, folder, replace(jail, keep=(memory,)), network, None)
            launched, guest, machine = started
            try:
                await machine.monitor.stop()
                await machine.monitor.save_devices(f"{FOLDER}/devices")
                pid = _qemu_of(cgroup, launched.pid)
                await asyncio.to_thread(self._templates.make, key, pid, memory, folder)
                await machine.monitor.go_on()
            except BaseException:
                guest.close()
                await machine.close()
                raise
        finally:
            os.close(memory)
        return started

    async def _start(
        self,
        plan: _Plan,
        folder: Path,
        jail: LaunchRequest,
        network: BoxNetwork,
        snapshot: Snapshot | None,
    ) -> tuple[Launched, Guest, Machine]:
        machine = folder / "vm"
        below = await asyncio.to_thread(self._make_folders, folder, plan.disk, snapshot)
        disks = [(folder / "disks" / str(n), f"{DISKS}/{n}", True) for n in range(below)]
        if snapshot is not None:
            jail = replace(jail, keep=(snapshot.memory,))
        if network.tap is not None:
            jail = replace(jail, keep=(*jail.keep, network.tap))
        async with self._images.using("host") as host:
            jail = replace(
                jail, layers=host.layers, binds=(*host.binds, (machine, FOLDER, False), *plan.binds(), *disks),
                scratch_bytes=_JAIL_BYTES, scratch_inodes=_JAIL_INODES,
            )  # fmt: skip
            launched = await self._launcher.launch(jail)
        call = qemu_call(plan.program, plan.hardware, plan.options, below=below)
        state = None if snapshot is None else snapshot.devices
        try:
            keeper = await Guest.connect(jail.socket)
        except NodeError as error:
            raise LaunchError(f"the jail of the machine has ended: {error}") from error
        running, guest = await start_machine(keeper, machine, call, state)
        return launched, guest, running

    def _make_folders(self, box: Path, disk: tuple[int, int], snapshot: Snapshot | None) -> int:
        """Make what a machine has of files, and return how many disks its own stands on.

        QEMU's user owns what it may write, as its jail sees it.
        """
        machine = box / "vm"
        machine.mkdir(mode=0o700)
        if snapshot is not None:
            below = link_disks(snapshot.disks, box / "disks")
            self._overlays.make(box / "disks", machine / "disk")
        else:
            (box / "disks").mkdir(mode=0o700)
            below = 0
            with (machine / "disk").open("xb+") as file:
                self._disks.format(file.fileno(), *disk)
        (machine / "disk").chmod(0o600)
        os.chown(machine / "disk", USER, USER)
        os.chown(machine, USER, USER)
        return below


def _qemu_of(cgroup: Cgroup, init: int) -> int:
    """Return the process of a machine.

    Raises:
        NodeError: There is none, or more than one: it is not what it was.
    """
    others = set(cgroup.processes()) - {init}
    if len(others) != 1:
        raise NodeError(f"{len(others)} processes where a machine has one")
    return others.pop()


def _copy(pid: int, box: Path, target: Path) -> int:
    save_machine(box, target)
    base = memory_of(pid)
    try:
        return copy_memory(pid, base)
    finally:
        os.close(base)

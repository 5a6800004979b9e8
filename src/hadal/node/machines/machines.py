"""The machines of a node: what all of them need, made once, and each one started, from a template if it can be."""

import asyncio
import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hadal.errors import LaunchError, NodeError, UnsupportedError
from hadal.node.box_networks import BoxNetworks
from hadal.node.cgroups import Cgroup
from hadal.node.faults import reach
from hadal.node.guest import Guest
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore, ResolvedImage
from hadal.node.launcher import Launched, Launcher, LaunchRequest
from hadal.node.machines.asleep import (
    Slept,
    clear_folder,
    forget_asleep,
    opened_asleep,
    save_asleep,
)
from hadal.node.machines.choice import Choice
from hadal.node.machines.disk_images import DiskImages, disk_images_folder, is_disk_image
from hadal.node.machines.firecracker.hypervisor import Firecracker
from hadal.node.machines.guest_service import make_seed
from hadal.node.machines.hypervisor import Hypervisor
from hadal.node.machines.initramfs import make_initramfs
from hadal.node.machines.kept import KeptMachine, KeptMachines, is_kept
from hadal.node.machines.kernel import Kernel, find_kernel, kernel_folder
from hadal.node.machines.machine import (
    USER,
    Machine,
    hardware_of,
    measure_tsc_khz,
    settle,
    settle_again,
)
from hadal.node.machines.plan import Plan, Start
from hadal.node.machines.qemu import DISKS, FOLDER
from hadal.node.machines.qemu_hypervisor import Qemu
from hadal.node.machines.snapshots import (
    Overlays,
    Snapshot,
    Templates,
    link_disks,
    save_disk,
    save_machine,
)
from hadal.node.network import BoxNetwork
from hadal.node.scratch import Disks
from hadal.node.sparse import copy_file
from hadal.node.tree_removal import remove_tree
from hadal.sandbox.specs import MachineSpec, Spec, VMSpec, read_spec

__all__ = ["Machines"]

_JAIL_BYTES = 1 << 20
_JAIL_INODES = 256
_HYPERVISOR = "hypervisor"
"""In the folder of a box: what runs its machine."""
_OF_A_DISK = ("firmware", "guest")
"""Fields of a spec that the disk it boots from has a say in."""
_TSC_ERROR = 0.002
"""Of a measurement, which takes a tenth of a second."""


class Machines:
    """Starts machines and finds them again.

    Args:
        folder: For what all need: templates, an initial RAM disk for each kernel, and `kernel/`, one of the
            user's.
        images: Where roots come from.
        launcher: Makes jails.
        disks: Formats what machines write.
        networks: Of boxes.
        choice: What they run on.

    Attributes:
        kept: Snapshots that somebody keeps.
        disk_images: What whole machines boot from.
    """

    def __init__(
        self, folder: Path, images: ImageStore, launcher: Launcher, disks: Disks, networks: BoxNetworks,
        choice: Choice,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._images = images
        self._launcher = launcher
        self._disks = disks
        self._choice = choice
        self._hypervisors: dict[str, Hypervisor] = {
            "qemu": Qemu(),
            "qemu without guest": Qemu(has_guest=False),
            "firecracker": Firecracker(networks),
        }
        self._tsc_khz: int | None = None
        self._ramdisks: dict[tuple[Kernel, tuple[str, ...]], Path] = {}
        self._first = threading.Lock()  # the two above are made by whichever machine is the first
        self._templates = Templates(folder / "templates")
        self._overlays = Overlays()
        self._copies = folder / "copies"
        self.kept = KeptMachines(folder / "kept")
        self.kept.sweep()
        self.disk_images = DiskImages(disk_images_folder(folder.parent))
        self.disk_images.sweep()
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
        plan = await asyncio.to_thread(self._plan, spec, root, jail.lease_s)
        if snapshot is not None:
            started = await self._start(plan, folder, jail, network, snapshot)
        elif spec.from_ is not None and is_kept(spec.from_):
            started = await self._start_kept(spec.from_, plan, folder, jail, network)
        else:
            started = await self._start_new(plan, folder, jail, cgroup, network)
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
        try:
            hypervisor = self._hypervisor_of(folder)
        except OSError as error:
            raise NodeError(f"what runs the machine {folder.name} is not known: {error}") from error
        return await Machine.find(folder / "guest", folder / "vm", hypervisor.find)

    @contextlib.asynccontextmanager
    async def copied(
        self, machine: Machine, guest: Guest, cgroup: Cgroup, init: int, memory_mb: int
    ) -> AsyncGenerator[Snapshot]:
        """Yield a machine as it is now, for others to start from; it goes on meanwhile.

        Args:
            machine: That.
            guest: In it.
            cgroup: Of its box.
            init: First process of that.
            memory_mb: MiB that it has.

        Raises:
            NodeError: It does not stand still, or the disk is full.
            UnsupportedError: It stands on too many others.
        """
        box, hypervisor = machine.folder.parent, self._hypervisor_of(machine.folder.parent)
        folder, memory = self._copies / uuid.uuid4().hex, None
        try:
            async with machine.still(guest):
                reach("machine.still")
                await machine.monitor.save_state()
                await asyncio.to_thread(save_machine, box, folder)
                memory = await asyncio.to_thread(
                    hypervisor.memory, machine.folder, memory_mb << 20, cgroup, init
                )
            reach("machine.copied")
            yield Snapshot(folder, memory)
        except OSError as error:
            raise NodeError(
                f"cannot copy the machine {box.name}: {error.strerror}",
                hint="free space on the node's disk, or memory",
            ) from error
        finally:
            if memory is not None:
                os.close(memory)
            await asyncio.to_thread(remove_tree, folder)

    async def lay_down(
        self, machine: Machine, guest: Guest, cgroup: Cgroup, init: int,
        decide: Callable[[dict[int, bool]], bool],
    ) -> bool:  # fmt: skip
        """Keep a machine as it is now beside its disk; then its hypervisor can be ended.

        Args:
            machine: That.
            guest: In it; whatever it is sent from now on waits, until the machine has woken.
            cgroup: Of its box.
            init: First process of that.
            decide: Given the commands in it when all is kept, says whether it is to sleep.

        Returns:
            What `decide` did; where it is not to sleep, it goes on as if nothing had been.

        Raises:
            NodeError: It does not stand still, or the disk is full; it goes on.
        """
        box, hypervisor = machine.folder.parent, self._hypervisor_of(machine.folder.parent)
        connect = partial(hypervisor.reach, machine.folder)
        write = partial(hypervisor.save_memory, machine.folder, cgroup=cgroup, init=init)
        sleeps = False
        try:
            async with machine.lying(guest, connect) as lying:
                reach("asleep.still")
                await machine.monitor.save_state()
                await asyncio.to_thread(save_asleep, box, write)
                reach("asleep.saved")
                sleeps = lying.sleeps = decide(lying.known)
        except OSError as error:
            raise NodeError(
                f"cannot keep the memory of box {box.name}: {error.strerror}; it runs on",
                hint="free space on the node's disk",
            ) from error
        finally:
            if not sleeps:
                await asyncio.to_thread(forget_asleep, box)
        if sleeps:
            await machine.close()
            machine.jail = machine.control = None
        return sleeps

    async def wake(
        self, spec: MachineSpec, root: ResolvedImage, folder: Path, jail: LaunchRequest, network: BoxNetwork,
        slept: Slept, guest: Guest, about_to_run: Callable[[int], None],
    ) -> Machine:  # fmt: skip
        """Start a machine that sleeps: it goes on as the one that it was.

        Args:
            spec: Of it.
            root: Its image, in use.
            folder: Of its box.
            jail: How the box around its hypervisor is made.
            network: It has; its `tap` stays the caller's.
            slept: What is known of it.
            guest: In it.
            about_to_run: Called before it does, with the first process of its jail; from then on it cannot be
                woken again from what was kept.

        Raises:
            UnsupportedError: It was another hypervisor's.
            NodeError, LaunchError: It does not wake.
            OSError: There is too little memory.
        """
        plan = await asyncio.to_thread(self._plan, spec, root, jail.lease_s)
        if plan.hardware_key() != slept.kind:
            raise UnsupportedError("what was kept of its memory is of another QEMU, or accelerator")
        with contextlib.ExitStack() as stack:
            snapshot = await asyncio.to_thread(stack.enter_context, opened_asleep(folder))
            going_on = guest, about_to_run
            _, _, machine = await self._start(plan, folder, jail, network, snapshot, going_on)
        try:
            await settle_again(guest)
        except BaseException:
            await machine.close()
            raise
        return machine

    def kind(self, spec: MachineSpec, root: ResolvedImage) -> str:
        """Return the name of all that can wake a machine of this spec and image."""
        return self._plan(spec, root, 0).hardware_key()

    def _plan(self, spec: MachineSpec, root: ResolvedImage, lease_s: int) -> Plan:
        with self._first:
            if self._tsc_khz is None:
                self._choice = self._choice.made()
                emulated = self._choice.accelerator == "tcg"
                self._tsc_khz = self._find_tsc_khz() if emulated else 0
            processor = self._choice.accelerator, self._tsc_khz
        hypervisor, program, modules = self._choice.of(spec.backend)
        if is_disk_image(root.name):
            hardware = hardware_of(spec, 0, *processor)
            with self._first:
                seed = make_seed(self._folder) if hardware.seed else None
            if not hardware.guest:
                hypervisor += " without guest"
            return Plan(
                hypervisor=hypervisor, program=program, hardware=hardware, options={}, disk=(0, 0), layers=(),
                kernel=None, disk_image=root.name, seed=seed,
            )  # fmt: skip
        layers, kernel = (
            self._images.disks_of(root),
            find_kernel(kernel_folder(self._folder.parent)),
        )
        with self._first:
            if (kernel, modules) not in self._ramdisks:
                self._ramdisks[kernel, modules] = self._make_ramdisk(kernel, modules)
        count = len(layers)
        return Plan(
            hypervisor=hypervisor,
            program=program,
            hardware=hardware_of(spec, count, *processor),
            options={"layers": count, "pids": spec.pids, "shm_mb": spec.shm_mb, "lease_s": lease_s},
            disk=(spec.disk_mb << 20, spec.inodes),
            layers=layers,
            kernel=(kernel.image, self._ramdisks[kernel, modules]),
        )

    def resolved(self, spec: Spec) -> Spec:
        """Return a spec with what the disk or the machine that it starts from says of it.

        Raises:
            ImageError: There is none, or it is damaged.
            ConfigError: It cannot be had with the rest of the spec.
        """
        if not isinstance(spec, VMSpec) or (spec.firmware and spec.guest):
            return spec
        if is_disk_image(spec.root):
            disk = self.disk_images.find(spec.root)
            said = {"firmware": disk.firmware, "guest": disk.guest}
        elif spec.from_ is not None and is_kept(spec.from_):
            said = {name: self.kept.about(spec.from_).spec.get(name) for name in _OF_A_DISK}
        else:
            return spec
        fields = spec.model_dump(mode="json", by_alias=True)
        return read_spec(fields | {name: fields[name] or said[name] for name in _OF_A_DISK})

    async def keep_disk(
        self, machine: Machine, guest: Guest, spec: MachineSpec, name: str | None
    ) -> str:
        """Make a disk image of what a machine has on its disk, and return its reference.

        Args:
            machine: One that boots from a disk image.
            guest: In it.
            spec: Of it.
            name: For it. Default: one is made up.

        Raises:
            NodeError: It does not stand still, or the disk is full.
            ConfigError: It cannot have that name.
        """
        folder, box = self._copies / uuid.uuid4().hex, machine.folder.parent
        name = uuid.uuid4().hex[:16] if name is None else name
        try:
            async with machine.still(guest):
                await asyncio.to_thread(save_disk, box, folder)
            firmware, own = getattr(spec, "firmware", None) or "bios", getattr(spec, "guest", None)
            made = await asyncio.to_thread(
                self.disk_images.keep, name, f"box {box.name}", folder, firmware=firmware,
                guest="none" if own == "none" else "installed",
            )  # fmt: skip
            return made.reference
        except OSError as error:
            raise NodeError(
                f"cannot keep the disk of {box.name}: {error.strerror}",
                hint="free space on the node's disk",
            ) from error
        finally:
            await asyncio.to_thread(remove_tree, folder)

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

    def _make_ramdisk(self, kernel: Kernel, modules: tuple[str, ...]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        content = make_initramfs(guest_program(), kernel.needed_modules(modules))
        path = self._folder / f"initrd-{hashlib.sha256(content).hexdigest()[:16]}"  # part of a key
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.chmod(0o644)
        part.replace(path)
        return path

    async def _start_kept(
        self, reference: str, plan: Plan, folder: Path, jail: LaunchRequest, network: BoxNetwork
    ) -> tuple[Launched, Guest, Machine]:  # fmt: skip
        about = await asyncio.to_thread(self.kept.about, reference)
        if about.kind != plan.key():
            raise UnsupportedError(
                f"{reference} cannot go on here: it was kept by another QEMU, or with another kernel or lease",
                hint="start anew from a snapshot of its files",
            )
        with contextlib.ExitStack() as stack:
            snapshot = await asyncio.to_thread(stack.enter_context, self.kept.opened(reference))
            return await self._start(plan, folder, jail, network, snapshot)

    async def _start_new(
        self, plan: Plan, folder: Path, jail: LaunchRequest, cgroup: Cgroup, network: BoxNetwork
    ) -> tuple[Launched, Guest, Machine]:  # fmt: skip
        """Start one from the template of its kind, or boot: the first, and those of which nobody says when they have."""
        if not plan.hardware.guest:
            return await self._start(plan, folder, jail, network, None)
        disk = None if plan.disk_image is None else self.disk_images.find(plan.disk_image)
        key = plan.key("" if disk is None else disk.id)
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
        kind = self._plan(spec, root, lease_s).key()
        fields = spec.model_dump(mode="json", by_alias=True)
        return KeptMachine("", fields, root.digest or root.name, kind, time.time_ns(), 0)

    async def _boot(
        self,
        plan: Plan,
        key: str,
        folder: Path,
        jail: LaunchRequest,
        cgroup: Cgroup,
        network: BoxNetwork,
    ) -> tuple[Launched, Guest, Machine]:
        """Boot a machine, and make a template of it before it goes on."""
        started = await self._start(plan, folder, jail, network, None)
        launched, guest, machine = started
        size = plan.hardware.memory_mb << 20
        memory = partial(
            self._hypervisors[plan.hypervisor].memory, machine.folder, size, cgroup, launched.pid
        )
        try:
            async with machine.monitor.parted(guest):
                await machine.monitor.stop()
                await machine.monitor.save_state()
                await asyncio.to_thread(self._templates.make, key, folder, memory)
                await machine.monitor.go_on()
        except BaseException:
            guest.close()
            await machine.close()
            raise
        return started

    async def _start(
        self,
        plan: Plan,
        folder: Path,
        jail: LaunchRequest,
        network: BoxNetwork,
        snapshot: Snapshot | None,
        going_on: tuple[Guest, Callable[[int], None]] | None = None,
    ) -> tuple[Launched, Guest, Machine]:
        hypervisor = self._hypervisors[plan.hypervisor]
        if going_on is None:
            below = await asyncio.to_thread(self._make_folders, folder, plan, snapshot)
        else:
            below = await asyncio.to_thread(clear_folder, folder)
            jail.socket.unlink(missing_ok=True)
        disks = [(folder / "disks" / str(n), f"{DISKS}/{n}", True) for n in range(below)]
        async with self._images.using("host") as host:
            with hypervisor.jailed(plan, network, snapshot) as given:
                binds = (*host.binds, (folder / "vm", FOLDER, False), *plan.binds(), *disks)
                request = replace(
                    jail, layers=host.layers, binds=binds, scratch_bytes=_JAIL_BYTES, scratch_inodes=_JAIL_INODES, **given,
                )  # fmt: skip
                launched = await self._launcher.launch(request)
        try:
            keeper = await Guest.connect(jail.socket)
        except NodeError as error:
            raise LaunchError(f"the jail of the machine has ended: {error}") from error
        same, about_to_run = going_on or (None, None)
        start = Start(
            plan=plan, folder=folder / "vm", below=below, snapshot=snapshot, network=network, pid=launched.pid,
            owner=(jail.uid_base or 0) + USER, guest=same, about_to_run=about_to_run,
        )  # fmt: skip
        running, guest = await hypervisor.start(keeper, start)
        return launched, guest, running

    def _hypervisor_of(self, box: Path) -> Hypervisor:
        return self._hypervisors[(box / _HYPERVISOR).read_text(encoding="ascii")]

    def _make_folders(self, box: Path, plan: Plan, snapshot: Snapshot | None) -> int:
        """Make what a machine has of files, and return how many disks its own stands on.

        The hypervisor's user owns what it may write, as its jail sees it.
        """
        machine = box / "vm"
        machine.mkdir(mode=0o700)
        (box / _HYPERVISOR).write_text(plan.hypervisor, encoding="ascii")
        stands_on = None if snapshot is None else snapshot.disks
        if snapshot is None and plan.disk_image is not None:
            stands_on = self.disk_images.disks(plan.disk_image)
        if stands_on is not None and not self._hypervisors[plan.hypervisor].chains:
            (box / "disks").mkdir(mode=0o700)
            below = 0
            with (stands_on / "0").open("rb") as file:
                copy_file(file.fileno(), machine / "disk")
        elif stands_on is not None:
            below = link_disks(stands_on, box / "disks")
            self._overlays.make(box / "disks", machine / "disk")
        else:
            (box / "disks").mkdir(mode=0o700)
            below = 0
            with (machine / "disk").open("xb+") as file:
                self._disks.format(file.fileno(), *plan.disk)
        (machine / "disk").chmod(0o600)
        os.chown(machine / "disk", USER, USER)
        os.chown(machine, USER, USER)
        return below

"""The boxes of one machine: made, found again after a restart, and ended; nothing of them is left behind."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass, replace
from typing import Any

from hadal.errors import (
    ConfigError,
    GoneCause,
    HadalError,
    LaunchError,
    NoCapacityError,
    NodeError,
    SandboxGoneError,
    UnsupportedError,
)
from hadal.node.blobs import Blobs
from hadal.node.box import Box
from hadal.node.box_networks import BoxNetworks
from hadal.node.branching import ForkLayers
from hadal.node.calls import Calls
from hadal.node.cgroups import Cgroups
from hadal.node.faults import reach
from hadal.node.files import BoxFiles
from hadal.node.forks import Forks
from hadal.node.guest import Guest, GuestLostError
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore, ResolvedImage
from hadal.node.journal import BoxRecord, Journal
from hadal.node.launch_request import check_mounts, launch_request
from hadal.node.launcher import Launcher
from hadal.node.machines.asleep import forget_asleep
from hadal.node.machines.choice import Choice
from hadal.node.machines.disk_images import disk_image_root, is_disk_image
from hadal.node.machines.kept import check_alike, is_kept
from hadal.node.machines.machine import Machine
from hadal.node.machines.machines import Machines
from hadal.node.machines.snapshots import Snapshot
from hadal.node.network import LiveNetwork
from hadal.node.node_config import NodeConfig
from hadal.node.orders import defaults_of
from hadal.node.processes import start_time
from hadal.node.scratch import DiskPool, Disks
from hadal.node.sleep import Sleep
from hadal.node.slots import Slots, limits_of, memory_mb
from hadal.node.snapshots import Snapshots
from hadal.node.spares import Spares
from hadal.node.steps import begin_step
from hadal.node.tree_removal import remove_tree
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.protocol import CreateRequest
from hadal.sandbox.results import BoxInfo
from hadal.sandbox.specs import FunctionSpec, MachineSpec, Spec, read_spec

__all__ = ["Node"]

logger = logging.getLogger(__name__)
_IDS = "abcdefghijkmnpqrstuvwxyz23456789"
_UIDS = 65536
_SOCKET_BYTES = 107


@dataclass(frozen=True)
class _Origin:
    """Of a box that is made from another: that one, its image, and what it begins with.

    Attributes:
        forked: Copies of changes above the image, the latest first.
        snapshot: Of a machine.
    """

    parent: str
    image: str
    forked: tuple[str, ...]
    snapshot: Snapshot | None = None


class Node:
    """The boxes of this machine. All methods run on one event loop.

    Args:
        config: Settings.
        images: Where their roots come from. Default: the store in the state folder.
    """

    def __init__(self, config: NodeConfig, images: ImageStore | None = None) -> None:
        self.config = config
        self.images = images or ImageStore(config.state / "images")
        self.networks = BoxNetworks(config.name, config.host_mounts)
        self.boxes: dict[str, Box] = {}
        self.started_ns = time.time_ns()
        self._folder = config.state / "b"
        self._pending: dict[str, asyncio.Task[Box]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self.slots = Slots(config.max_boxes, config.memory_mb)
        self._launcher = Launcher(guest_program(), self._init_exited)
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._forked: dict[str, list[str]] = {}
        self._roots: dict[str, ResolvedImage] = {}
        self.calls = Calls(self)
        self.spares = Spares(self)
        self.forks = Forks(self)
        self.snapshots = Snapshots(self)
        self.sleep = Sleep(self)

    # --- life of the node ---

    async def start(self) -> None:
        """Open the journal, find the boxes of an earlier daemon again, and remove what is nobody's.

        Raises:
            JournalError: It cannot be opened.
            UnsupportedError: Boxes cannot be made on this host.
        """
        for folder in (self.config.state, self._folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if len(os.fsencode(self._folder / ("x" * 12) / "guest")) > _SOCKET_BYTES:
            raise ConfigError(
                f"the state folder's path is too long for sockets: {self.config.state}",
                hint=f"choose one of at most {_SOCKET_BYTES - 22} bytes",
            )
        self.journal = Journal(self.config.state / "journal.db", sync=self.config.sync)
        self.blobs = Blobs(self.config.state / "blobs")
        self.cgroups = Cgroups(self.config.name)
        self._launcher.start()
        self.blobs.sweep()
        self.disks = Disks(self.config.state / "d")
        self._disk_pool = DiskPool(self.disks)
        self.machines = Machines(
            self.config.state / "machines", self.images, self._launcher, self.disks,
            self.networks, Choice(self.config.accelerator, self.config.microvm),
        )  # fmt: skip
        self.fork_layers = ForkLayers(self.config.state / "f", self.disks)
        await self._recover()
        await self.sweep_fork_layers()
        self._watch = asyncio.get_running_loop().create_task(self._enforce_lives())

    @property
    def memory_mb(self) -> int:
        """MiB that its boxes may use, each by its limit."""
        return self.slots.used_mb

    async def close(self, *, end_boxes: bool = False) -> None:
        """End the daemon. Boxes live on until their lease ends, unless told otherwise."""
        if self._watch is not None:
            self._watch.cancel()
        await self.spares.close()
        await self.sleep.close()
        if end_boxes:
            await asyncio.gather(*(self.end(box, GoneCause.KILLED) for box in list(self.boxes)))
        await asyncio.gather(*self._ending.values(), return_exceptions=True)
        self._closing = True
        for box in self.boxes.values():
            await box.let_go()
        self._disk_pool.close()
        await self.networks.close()
        await self.images.close()
        self._launcher.close()
        self.cgroups.remove()
        self.journal.close()

    async def _recover(self) -> None:
        living = self.journal.living_boxes()
        await self.networks.recover(
            {r.id: _network_of(r) for r in living if r.runtime.get("network")}
        )
        found = await asyncio.gather(*(self._adopt(record) for record in living))
        for record, box in zip(living, found, strict=True):
            if box is None:
                await self._remove(record.id)
                if record.state == "creating" or record.runtime.get("spare"):
                    self.journal.forget_box(record.id)  # nobody has been told of it
                else:
                    self.journal.end_box(record.id, GoneCause.NODE_LOST)
                logger.warning("box not found again", extra={"sandbox_id": record.id})
            else:
                self.boxes[box.id] = box
                self._watch_guest(box)
                try:
                    if "asleep" in record.runtime:
                        await self.sleep.take_up(box, record)
                    else:
                        await asyncio.to_thread(forget_asleep, box.folder)
                        await box.reconcile()
                    await BoxFiles(box, self.journal, self.blobs).repeat_begun()
                    if record.state == "paused" and box.nap is None:
                        await box.pause()
                except (UnsupportedError, NoCapacityError) as error:
                    logger.warning("%s", error, extra={"sandbox_id": record.id})
                except (NodeError, SandboxGoneError):
                    await self.end(box.id, GoneCause.NODE_LOST)  # it does not answer
                logger.info("box found again", extra={"sandbox_id": record.id})
        for box_id in list(self.boxes):
            await self.forks.undo(box_id)
        known = set(self.boxes)
        for orphan in self.cgroups.boxes() | {p.name for p in self._folder.iterdir()}:
            if orphan not in known:
                await self._remove(orphan)

    async def _adopt(self, record: BoxRecord) -> Box | None:
        """Find a box again: only one whose making was complete, and whose init is still the same."""
        pid = record.runtime.get("pid")
        if record.state == "creating" or pid is None or record.runtime.get("spare"):
            return None
        sleeps = "asleep" in record.runtime
        if not sleeps and start_time(pid) != record.runtime.get("pid_start"):
            return None
        # Paused, or held by a daemon that died: it must run to say what became of its commands.
        with contextlib.suppress(OSError):
            self.cgroups.of(record.id).thaw()
        machine: Machine | None = None
        folder = self._folder / record.id
        try:
            spec = read_spec(record.spec)
            if sleeps:
                machine, guest = self.sleep.find(record, folder)
            elif isinstance(spec, MachineSpec):
                machine, guest = await self.machines.find(folder)
            else:
                guest = await Guest.connect(folder / "guest")
            root = await self._acquire(record.runtime["image"])
        except (GuestLostError, HadalError) as error:
            logger.warning("box lost: %s", error, extra={"sandbox_id": record.id})
            return None
        self._roots[record.id] = root
        self.slots.adopt(record.id, record.runtime["slot"], memory_mb(spec))
        self._forked[record.id] = record.runtime.get("forked", [])
        return self._box(record, spec, root, pid, guest, record.runtime["disk"], machine)

    # --- making boxes ---

    async def create(self, request: CreateRequest) -> Box:
        """Make a box; the same request again, or its name or trajectory, returns the one there is.

        Raises:
            ConfigError: Its spec asks for what is not on this node.
            NoCapacityError: The node is full.
            ImageError: Its image cannot be had.
            LaunchError: It could not be made.
            SandboxGoneError: This request made one that is gone.
        """
        pending = self._pending.get(request.request_id)
        if pending is None:
            existing = self._existing(request)
            if existing is not None:
                return existing
            # A task of its own: the box is made, and known, even when the caller has gone away.
            pending = asyncio.get_running_loop().create_task(self._create(request))
            self._pending[request.request_id] = pending
            pending.add_done_callback(lambda _: self._pending.pop(request.request_id, None))
        return await asyncio.shield(pending)

    def _existing(self, request: CreateRequest) -> Box | None:
        record = self.journal.box_of_request(request.request_id)
        if record is None and request.trajectory is not None:
            record = self.journal.box_of_trajectory(request.trajectory)
        if record is not None:
            return self.get(record.id)
        if request.name is not None:
            living = (b for b in self.boxes.values() if b.cause is None)
            return next((b for b in living if b.name == request.name), None)
        return None

    async def make_spare(self, request: CreateRequest) -> Box:
        """Make a box that nobody is told of before it is handed over to somebody.

        Raises:
            HadalError: It cannot be made.
        """
        return await self._create(request, spare=True)

    async def _create(
        self, request: CreateRequest, origin: _Origin | None = None, *, spare: bool = False
    ) -> Box:
        spec = self.machines.resolved(read_spec(request.spec))
        check_mounts(spec)
        if isinstance(spec, MachineSpec) and origin is None and not spare:
            given = await self.spares.give(request, spec)
            if given is not None:
                return given
        box_id = "".join(secrets.choice(_IDS) for _ in range(12))
        slot = self.slots.take(box_id, memory_mb(spec))
        forked = self._forked[box_id] = list(origin.forked) if origin else []
        runtime: dict[str, Any] = {"slot": slot, "forked": forked}
        if origin is not None:
            runtime["image"] = origin.image
        if spare:
            runtime["spare"] = True
        record = BoxRecord(
            id=box_id, request_id=request.request_id, name=request.name,
            trajectory=request.trajectory, parent=origin.parent if origin else None,
            spec=spec.model_dump(mode="json", by_alias=True), state="creating", cause=None,
            created_ns=time.time_ns(), ended_ns=None, runtime=runtime,
        )  # fmt: skip
        try:
            self.journal.add_box(record)
            box: Box | None = None
            try:
                box = await self._make(record, spec, slot, runtime, origin and origin.snapshot)
                if box.machine is not None:
                    await box.reconcile()  # with what runs in a copy
                runtime |= {"pid": box.pid, "pid_start": start_time(box.pid)}
                self.journal.set_box(box_id, state="running", runtime=runtime)
            except BaseException:
                if box is not None:
                    await box.let_go()
                await self._remove(box_id)
                self.journal.forget_box(box_id)
                raise
        except OSError as error:
            self._release(box_id)
            raise NodeError(
                f"cannot make a box: {error.strerror}", hint="free space on the node's disk"
            ) from error
        except BaseException:
            self._release(box_id)
            raise
        self.boxes[box_id] = box
        self._watch_guest(box)
        if isinstance(spec, FunctionSpec):
            self.calls.start(box)
        return box

    def _origin(self, box_id: str, *layers: str) -> _Origin:
        """Return what a box like this one starts from: the very image, whatever its name means by now."""
        root = self._roots[box_id]
        return _Origin(box_id, root.digest or root.name, (*layers, *self._forked[box_id]))

    def _release(self, box_id: str) -> None:
        self.slots.give_back(box_id)
        self._forked.pop(box_id, None)

    async def _make(
        self, record: BoxRecord, spec: Spec, slot: int, runtime: dict[str, Any], snapshot: Snapshot | None
    ) -> Box:  # fmt: skip
        box_id = record.id
        folder = self._folder / box_id
        reference = runtime.get("image") or await self.image_of(spec)
        root = self._roots[box_id] = await self._acquire(reference)
        runtime["image"] = root.digest or root.name
        is_machine = isinstance(spec, MachineSpec)
        network = await self.networks.take(box_id, spec.network, machine=is_machine)
        runtime["network"] = network.number
        reach("make.folder")
        (folder / "mounts").mkdir(parents=True)
        cgroup = self.cgroups.of(box_id)
        cgroup.create(limits_of(spec))
        reach("make.launch", writes=False)
        copies = map(self.fork_layers.path, self._forked[box_id])
        request = launch_request(
            folder, spec, layers=(*copies, *root.layers), binds=root.binds, cgroup=cgroup, network=network,
            uid_base=self.uid_base(slot), lease_s=self.config.lease_s,
        )  # fmt: skip
        if isinstance(spec, MachineSpec):
            runtime["disk"] = -1
            try:
                launched, guest, machine = await self.machines.start(
                    spec, root, folder, request, cgroup, network, snapshot
                )
            finally:
                if network.tap is not None:
                    os.close(network.tap)
            return self._box(record, spec, root, launched.pid, guest, -1, machine)
        disk = await self._disk_pool.take(spec.disk_mb << 20, spec.inodes)
        runtime["disk"] = disk.device
        try:
            launched = await self._launcher.launch(replace(request, scratch=disk.descriptor))
        finally:
            os.close(disk.descriptor)
        reach("make.launched", writes=False)
        guest = await Guest.connect(folder / "guest")
        return self._box(record, spec, root, launched.pid, guest, disk.device)

    def uid_base(self, slot: int) -> int:
        """Return the first id on the host of the users of the box in a place."""
        return self.config.first_uid + slot * _UIDS

    async def _acquire(self, reference: str) -> ResolvedImage:
        if is_disk_image(reference):
            return disk_image_root(reference)
        return await self.images.acquire(reference)

    async def image_of(self, spec: Spec) -> str:
        """Return the image that a box is made from.

        Raises:
            ConfigError: It is to start from a machine that it is not like.
        """
        if spec.from_ is None or not is_kept(spec.from_):
            return spec.root
        about = await asyncio.to_thread(self.machines.kept.about, spec.from_)
        check_alike(spec, about)
        return about.image

    def _box(
        self, record: BoxRecord, spec: Spec, root: ResolvedImage, pid: int, guest: Guest, disk: int,
        machine: Machine | None = None,
    ) -> Box:  # fmt: skip
        return Box(
            record=record, spec=spec, defaults=defaults_of(root), folder=self._folder / record.id,
            cgroup=self.cgroups.of(record.id), journal=self.journal, blobs=self.blobs, pid=pid,
            guest=guest, disk=disk, machine=machine,
        )  # fmt: skip

    async def sweep_fork_layers(self) -> None:
        """Remove copies of changes that no box stands on."""
        await self.fork_layers.sweep(
            {layer for layers in self._forked.values() for layer in layers}
        )

    async def make_like(
        self, box: Box, request_id: str, *layers: str, snapshot: Snapshot | None = None
    ) -> Box:
        """Make another box of the same spec and image, with what the given one began with.

        Args:
            box: That one.
            request_id: Of the new one.
            layers: Copies of changes that lie above it.
            snapshot: Of it, where it is a machine.
        """
        spec = box.spec.model_dump(mode="json", by_alias=True)
        spec |= {"spare": 0} if "spare" in spec else {}
        create = CreateRequest(spec=spec, request_id=request_id)
        origin = replace(self._origin(box.id, *layers), snapshot=snapshot)
        return await self._create(create, origin)

    async def set_network(self, box: Box, policy: NetworkPolicy, request_id: str) -> None:
        """Change what a box may reach, from the next packet on.

        Raises:
            UnsupportedError: It was made without a network.
            NodeError: The kernel refuses; the box then may reach nothing more than before.
        """
        box.touch()
        record = self.journal.record_of_request(box.id, request_id)
        if record is not None and record.event.state == "done":
            return
        request = policy.to_json()
        with begin_step(
            self.journal, box, "network", request, request_id=request_id, record=record
        ) as step:
            await self.networks.update(box.id, policy)
            step.stays_begun = True  # it is done, and cannot be refused any more
            self.journal.set_spec(box.id, {"network": request})

    def base_of(self, box: Box) -> tuple[ResolvedImage, list[str]]:
        """Return the image of a box, and the copies of changes that lie above it."""
        return self._roots[box.id], self._forked[box.id]

    # --- looking ---

    def get(self, box_id: str) -> Box:
        """Return a living box.

        Raises:
            SandboxGoneError: With the cause of its end, or that the node has never had it.
        """
        box = self.boxes.get(box_id)
        if box is not None and box.cause is None:
            return box
        record = self.journal.box(box_id)
        if record is None:
            raise SandboxGoneError(f"no box {box_id} on this node", cause=GoneCause.NOT_FOUND)
        text = record.cause or (box.cause if box is not None else None) or GoneCause.CRASHED
        cause = GoneCause(text) if text in set(GoneCause) else GoneCause.CRASHED
        raise SandboxGoneError(
            f"box {box_id} is gone: {text}",
            cause=cause,
            hint="its log is kept: `hadal box log`, or start anew with another trajectory",
        )

    def info(self, box_id: str) -> BoxInfo:
        """Return what is known of a box, living or gone."""
        record = self.journal.box(box_id)
        if record is None:
            raise SandboxGoneError(f"no box {box_id} on this node", cause=GoneCause.NOT_FOUND)
        box = self.boxes.get(box_id)
        used = time.time() - (time.monotonic() - box.used) if box is not None else 0
        return BoxInfo(
            id=record.id,
            state=record.state,
            cause=record.cause,
            backend=record.spec["backend"],
            image=record.spec.get("from") or record.spec["image"],
            name=record.name,
            trajectory=record.trajectory,
            created_ns=record.created_ns,
            used_ns=int(used * 1e9),
            capabilities=tuple(sorted(read_spec(record.spec).can)),
            labels=record.spec["labels"],
        )

    # --- ending ---

    async def end(self, box_id: str, cause: GoneCause) -> bool:
        """End a box and remove all of it; False where it has ended already."""
        ending = self._ending.get(box_id)
        begun = None if ending is not None else self.begin_end(box_id, cause)
        if ending is None and begun is None:
            return False
        await asyncio.shield(ending or begun or asyncio.sleep(0))
        return begun is not None

    def begin_end(self, box_id: str, cause: GoneCause) -> asyncio.Task[None] | None:
        """Kill a box, and go on removing it; from now on it is gone. None where it has ended already.

        Raises:
            JournalError: Its end cannot be written down. It ends all the same.
        """
        box = self.boxes.get(box_id)
        if box is None or box_id in self._ending:
            return None
        if box.cause is None:
            box.cause = cause
        box.kill()
        ending = asyncio.get_running_loop().create_task(self._end(box))
        self._ending[box_id] = ending
        ending.add_done_callback(lambda _: self._ending.pop(box_id, None))
        self.journal.end_box(box.id, box.cause)
        return ending

    async def _end(self, box: Box) -> None:
        assert box.cause is not None
        await self.sleep.leave(box)
        await asyncio.wait([box.guest.lost], timeout=5)
        await box.let_go()
        self.journal.end_box(box.id, box.cause)  # again, where it could not be written down before
        await self._remove(box.id)
        self.boxes.pop(box.id, None)
        await self.calls.end(box.id)
        logger.info("box ended", extra={"sandbox_id": box.id, "cause": str(box.cause)})

    async def _remove(self, box_id: str) -> None:
        """Remove every trace of a box: processes, groups, files. Safe to repeat, at any point of its life."""
        reach("remove.processes", writes=False)
        cgroup = self.cgroups.of(box_id)
        deadline = time.monotonic() + 10
        while not cgroup.remove():
            for pid in cgroup.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                cgroup.thaw()
            if time.monotonic() > deadline:
                raise LaunchError(f"processes of box {box_id} do not end: {cgroup.processes()}")
            await asyncio.sleep(0.002)
        reach("remove.files", writes=False)
        await self.networks.give_back(box_id)
        root = self._roots.pop(box_id, None)
        if root is not None and not is_disk_image(root.name):
            await self.images.release(root)
        folder = self._folder / box_id
        if folder.exists():
            await asyncio.to_thread(remove_tree, folder)
        self.slots.give_back(box_id)
        if self._forked.pop(box_id, None):
            await self.sweep_fork_layers()

    def _watch_guest(self, box: Box) -> None:
        def lost(_: object) -> None:
            if self._closing:
                return  # it is we who leave
            box.lost()
            asyncio.get_running_loop().create_task(self.end(box.id, GoneCause.CRASHED))

        box.guest.lost.add_done_callback(lost)

    def _init_exited(self, pid: int, status: int) -> None:
        logger.debug("init of a box ended", extra={"pid": pid, "status": status})

    async def _enforce_lives(self) -> None:
        """End boxes whose time is over, and pause those that nobody uses, however the clients fare."""
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            for box in [b for b in self.boxes.values() if b.look_again <= now]:
                if (cause := box.overdue()) is not None:
                    asyncio.get_running_loop().create_task(self.end(box.id, cause))
                elif box.is_drowsy():
                    asyncio.get_running_loop().create_task(self.sleep.begin_unasked(box))


def _network_of(record: BoxRecord) -> LiveNetwork:
    policy = read_spec(record.spec).network
    return LiveNetwork(record.runtime["network"], policy, "asleep" in record.runtime)

"""The boxes of one machine: made, found again after a restart, and ended; nothing of them is left behind."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from hadal.errors import (
    ConfigError,
    GoneCause,
    HadalError,
    LaunchError,
    NoCapacityError,
    NodeError,
    SandboxGoneError,
)
from hadal.node.blobs import Blobs
from hadal.node.box import Box, ImageDefaults, refusal_of
from hadal.node.branching import ForkLayers
from hadal.node.cgroups import BoxLimits, Cgroup, Cgroups
from hadal.node.faults import reach
from hadal.node.files import BoxFiles
from hadal.node.functions import CallServer
from hadal.node.guest import Guest, GuestLostError
from hadal.node.guest_program import guest_program
from hadal.node.journal import BoxRecord, Journal
from hadal.node.launcher import Launcher, LaunchRequest
from hadal.node.scratch import Disks
from hadal.node.tree_removal import remove_tree
from hadal.sandbox.protocol import CallRequest, CreateRequest
from hadal.sandbox.results import BoxInfo
from hadal.sandbox.specs import Capability, FunctionSpec, Spec, read_spec

__all__ = ["Images", "Node", "NodeConfig", "Root"]

logger = logging.getLogger(__name__)
_IDS = "abcdefghijkmnpqrstuvwxyz23456789"
_UIDS = 65536
_SOCKET_BYTES = 107


@dataclass(frozen=True, kw_only=True)
class Root:
    """What an image gives a box.

    Attributes:
        layers: Directories, the top one first.
        binds: Of the node's file system: source, target; read-only.
        defaults: Of its commands.
    """

    layers: tuple[Path, ...]
    binds: tuple[tuple[Path, str], ...] = ()
    defaults: ImageDefaults = field(default_factory=ImageDefaults)


class Images(Protocol):
    """Where roots come from."""

    async def acquire(self, reference: str, holder: str) -> Root:
        """Return the root of an image, and keep it until released.

        Raises:
            ImageError: There is no such image, or it cannot be had.
        """
        ...

    async def release(self, holder: str) -> None:
        """Let go of what this holder has acquired."""
        ...


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Settings of a node.

    Attributes:
        state: Folder of its journal, boxes and images.
        name: Of the node on this machine; its control groups are named after it.
        max_boxes: That live at a time.
        lease_s: Seconds that boxes outlive the daemon.
        first_uid: Of the ids that boxes use on the host: 65,536 for each.
        sync: Whether every record of the journal waits for the disk.
    """

    state: Path
    name: str = "node"
    max_boxes: int = 10_000
    lease_s: int = 900
    first_uid: int = 1 << 20
    sync: Literal["process", "power"] = "process"


class Node:
    """The boxes of this machine. All methods run on one event loop.

    Args:
        config: Settings.
        images: Where roots come from.
    """

    def __init__(self, config: NodeConfig, images: Images) -> None:
        self.config = config
        self.images = images
        self.boxes: dict[str, Box] = {}
        self.started_ns = time.time_ns()
        self._folder = config.state / "b"
        self._pending: dict[str, asyncio.Task[Box]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._slots: dict[str, int] = {}
        self._launcher = Launcher(guest_program(), self._init_exited)
        self._watch: asyncio.Task[None] | None = None
        self._forked: dict[str, list[str]] = {}
        self._servers: dict[str, CallServer] = {}
        self._spares: dict[str, list[asyncio.Task[Box]]] = {}

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
        self.fork_layers = ForkLayers(self.config.state / "f", self.disks)
        await self._recover()
        await self._sweep_fork_layers()
        self._watch = asyncio.get_running_loop().create_task(self._enforce_lives())

    async def close(self, *, end_boxes: bool = False) -> None:
        """End the daemon. Boxes live on until their lease ends, unless told otherwise."""
        if self._watch is not None:
            self._watch.cancel()
        if end_boxes:
            await asyncio.gather(*(self.end(box, GoneCause.KILLED) for box in list(self.boxes)))
        await asyncio.gather(*self._ending.values(), return_exceptions=True)
        for box in self.boxes.values():
            box.guest.close()
        self._launcher.close()
        self.journal.close()

    async def _recover(self) -> None:
        living = self.journal.living_boxes()
        found = await asyncio.gather(*(self._adopt(record) for record in living))
        for record, box in zip(living, found, strict=True):
            if box is None:
                await self._remove(record.id)
                if record.state == "creating":
                    self.journal.forget_box(record.id)  # nobody has been told of it
                else:
                    self.journal.end_box(record.id, GoneCause.NODE_LOST)
                logger.warning("box not found again", extra={"sandbox_id": record.id})
            else:
                self.boxes[box.id] = box
                self._watch_guest(box)
                try:
                    await box.reconcile()
                    await BoxFiles(box, self.journal, self.blobs).repeat_begun()
                except (GuestLostError, SandboxGoneError):
                    await self.end(box.id, GoneCause.NODE_LOST)  # it does not answer
                logger.info("box found again", extra={"sandbox_id": record.id})
        for box_id in list(self.boxes):
            await self._undo_forks(box_id)
        known = set(self.boxes)
        for orphan in self.cgroups.boxes() | {p.name for p in self._folder.iterdir()}:
            if orphan not in known:
                await self._remove(orphan)

    async def _adopt(self, record: BoxRecord) -> Box | None:
        """Find a box again: only one whose making was complete, and whose init is still the same."""
        pid = record.runtime.get("pid")
        if record.state == "creating" or pid is None:
            return None
        if _start_time(pid) != record.runtime.get("pid_start"):
            return None
        try:
            guest = await Guest.connect(self._folder / record.id / "guest")
            spec = read_spec(record.spec)
            root = await self.images.acquire(spec.from_ or spec.image, record.id)
        except (GuestLostError, HadalError) as error:
            logger.warning("box lost: %s", error, extra={"sandbox_id": record.id})
            return None
        self._slots[record.id] = record.runtime["slot"]
        self._forked[record.id] = record.runtime.get("forked", [])
        return self._box(record, spec, root, pid, guest, record.runtime["disk"])

    # --- making boxes ---

    async def create(self, request: CreateRequest) -> Box:
        """Make a box; the same request again, or its name or trajectory, returns the one there is.

        Raises:
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
            return next((b for b in self.boxes.values() if b.name == request.name), None)
        return None

    async def _create(
        self, request: CreateRequest, parent: str | None = None, forked: Sequence[str] = ()
    ) -> Box:
        spec = read_spec(request.spec)
        if len(self._slots) >= self.config.max_boxes:
            raise NoCapacityError(
                f"the node has {len(self._slots)} boxes, as many as it may",
                hint="end some, wait, or raise max_boxes",
            )
        box_id = "".join(secrets.choice(_IDS) for _ in range(12))
        slot = self._take_slot(box_id)
        runtime: dict[str, Any] = {"slot": slot, "forked": list(forked)}
        self._forked[box_id] = list(forked)
        record = BoxRecord(
            id=box_id, request_id=request.request_id, name=request.name,
            trajectory=request.trajectory, parent=parent,
            spec=spec.model_dump(mode="json", by_alias=True), state="creating", cause=None,
            created_ns=time.time_ns(), ended_ns=None, runtime=runtime,
        )  # fmt: skip
        try:
            self.journal.add_box(record)
            try:
                box = await self._make(record, spec, slot, runtime)
                runtime |= {"pid": box.pid, "pid_start": _start_time(box.pid)}
                self.journal.set_box(box_id, state="running", runtime=runtime)
            except BaseException:
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
            self._server(box).start()
        return box

    def _release(self, box_id: str) -> None:
        self._slots.pop(box_id, None)
        self._forked.pop(box_id, None)

    def _take_slot(self, box_id: str) -> int:
        used = set(self._slots.values())
        slot = next(n for n in range(len(used) + 1) if n not in used)
        self._slots[box_id] = slot
        return slot

    async def _make(self, record: BoxRecord, spec: Spec, slot: int, runtime: dict[str, Any]) -> Box:
        box_id = record.id
        folder = self._folder / box_id
        root = await self.images.acquire(spec.from_ or spec.image, box_id)
        reach("make.folder")
        (folder / "mounts").mkdir(parents=True)
        cgroup = self.cgroups.of(box_id)
        cgroup.create(BoxLimits(memory_bytes=spec.memory_mb << 20, cpus=spec.cpus, pids=spec.pids))
        reach("make.launch", writes=False)
        disk = await asyncio.to_thread(self.disks.make, spec.disk_mb << 20, spec.inodes)
        runtime["disk"] = disk.device
        try:
            request = self._request(box_id, spec, slot, root, cgroup, disk.descriptor)
            launched = await self._launcher.launch(request)
        finally:
            os.close(disk.descriptor)
        reach("make.launched", writes=False)
        guest = await Guest.connect(folder / "guest")
        return self._box(record, spec, root, launched.pid, guest, disk.device)

    async def call(self, box_id: str, request: CallRequest) -> dict[str, Any]:
        """Call a function in a box of functions; the same request again returns the same answer.

        Raises:
            UnsupportedError: The box is of another kind.
            LaunchError: Its interpreter does not run.
        """
        box = self.get(box_id)
        box.require(Capability.CALL)
        record = self.journal.record_of_request(box_id, request.request_id)
        if record is not None:
            if record.event.state == "done" and record.event.result is not None:
                return {**json.loads(record.stdout), "recorded": True}
            raise refusal_of(record)
        box.touch()
        fields = request.model_dump(include={"source", "name", "arguments", "pickled"})
        details = {"fresh": request.fresh}
        position = box.begin("call", fields, request_id=request.request_id, details=details)
        try:
            answer = await self._perform_call(box, request)
        except HadalError as error:
            self.journal.end(box_id, position, "refused", {"message": error.message, "errno": 0})
            raise
        result = {k: answer[k] for k in ("error", "timed_out", "duration_s") if k in answer}
        self.journal.end(box_id, position, "done", result, stdout=json.dumps(answer).encode())
        return answer

    async def _perform_call(self, box: Box, request: CallRequest) -> dict[str, Any]:
        call = request.model_dump(include={"source", "name", "arguments", "pickled"})
        if not request.fresh:
            return await self._server(box).call(call, request.timeout_s)
        other = await self._unused(box)
        try:
            return await self._server(other).call(call, request.timeout_s)
        finally:
            asyncio.get_running_loop().create_task(self.end(other.id, GoneCause.KILLED))

    def _server(self, box: Box) -> CallServer:
        if box.id not in self._servers:
            self._servers[box.id] = CallServer(box)
        return self._servers[box.id]

    async def _unused(self, box: Box) -> Box:
        """Return a box like this one that nobody has used, and see that spare ones are made."""
        assert isinstance(box.spec, FunctionSpec)
        spares = self._spares.setdefault(box.id, [])
        for _ in range(box.spec.spare + 1 - len(spares)):
            spares.append(asyncio.get_running_loop().create_task(self._make_spare(box)))
        return await spares.pop(0)

    async def _make_spare(self, box: Box) -> Box:
        spec = {**box.spec.model_dump(mode="json", by_alias=True), "spare": 0}
        create = CreateRequest(spec=spec, request_id=f"spare/{secrets.token_hex(16)}")
        made = await self._create(create, box.id, self._forked[box.id])
        await self._server(made).start()
        return made

    def _request(
        self, box_id: str, spec: Spec, slot: int, root: Root, cgroup: Cgroup, scratch: int
    ) -> LaunchRequest:
        folder = self._folder / box_id
        binds = [(source, target, True) for source, target in root.binds]
        binds += [(Path(m.source), m.target, m.read_only) for m in spec.mounts]
        hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t{box_id}\n"
        return LaunchRequest(
            hostname=box_id,
            layers=(*map(self.fork_layers.path, self._forked[box_id]), *root.layers),
            run_directory=folder / "mounts",
            socket=folder / "guest",
            scratch=scratch,
            uid_base=self.config.first_uid + slot * _UIDS,
            cgroups=cgroup.procs,
            shm_bytes=spec.shm_mb << 20,
            etc={"hostname": f"{box_id}\n".encode(), "hosts": hosts.encode()},
            binds=tuple(binds),
            tmpfs=_function_scratch(spec) if isinstance(spec, FunctionSpec) else (),
            # Not 0: then a kernel that pipes dumps to a program would do so all the same.
            limits=("core=1:1", f"nofile=1024:{max(20_000, spec.nofile)}", "memlock=65536:65536"),
            read_only=spec.read_only or isinstance(spec, FunctionSpec),
            lease_s=self.config.lease_s,
        )

    def _box(
        self, record: BoxRecord, spec: Spec, root: Root, pid: int, guest: Guest, disk: int
    ) -> Box:
        return Box(
            record=record, spec=spec, defaults=root.defaults, folder=self._folder / record.id,
            cgroup=self.cgroups.of(record.id), journal=self.journal, blobs=self.blobs, pid=pid,
            guest=guest, disk=disk,
        )  # fmt: skip

    async def fork(self, box_id: str, count: int, request_id: str) -> list[Box]:
        """Make boxes that begin with the files of one: as they are now, while nothing in it runs.

        Raises:
            NodeError: The copy cannot be made.
            LaunchError, NoCapacityError: One of them could not be made; then none is.
        """
        box = self.get(box_id)
        box.require(Capability.FORK)
        record = self.journal.record_of_request(box_id, request_id)
        if record is not None and record.event.state == "done":
            return [self.get(child) for child in _children(record.event.result)]
        if record is not None and record.event.state != "begun":
            raise refusal_of(record)
        box.touch()
        if record is not None:
            position = record.event.position
        else:
            position = box.begin("fork", {"count": count}, request_id=request_id)
        layer = await self.fork_layers.copy(box, request_id)
        forked = [layer, *self._forked[box_id]]
        spec = box.spec.model_dump(mode="json", by_alias=True)
        made: list[Box] = []
        try:
            for number in range(count):
                create = CreateRequest(spec=spec, request_id=f"{request_id}/{number}")
                made.append(await self._create(create, box_id, forked))
        except HadalError as error:
            await asyncio.gather(*(self.end(child.id, GoneCause.KILLED) for child in made))
            self.journal.end(box_id, position, "refused", {"message": error.message, "errno": 0})
            await self._sweep_fork_layers()
            raise
        self.journal.end(box_id, position, "done", {"boxes": [child.id for child in made]})
        return made

    async def _undo_forks(self, box_id: str) -> None:
        """After a restart: the boxes of a fork that was not completed end, since nobody was told of them.

        The fork stays begun: the same request does it again.
        """
        for record in self.journal.begun(box_id):
            if record.event.kind != "fork":
                continue
            for number in range(int(str(record.event.request["count"]))):
                child = self.journal.box_of_request(f"{record.request_id}/{number}")
                if child is not None:
                    await self.end(child.id, GoneCause.KILLED)
                    self.journal.forget_box(child.id)

    async def _sweep_fork_layers(self) -> None:
        await self.fork_layers.sweep(
            {layer for layers in self._forked.values() for layer in layers}
        )

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
        state = "paused" if box is not None and box.paused else record.state
        used = time.time() - (time.monotonic() - box.used) if box is not None else 0
        return BoxInfo(
            id=record.id,
            state=state,
            cause=record.cause,
            backend=record.spec["backend"],
            image=record.spec.get("from") or record.spec["image"],
            name=record.name,
            trajectory=record.trajectory,
            created_ns=record.created_ns,
            used_ns=int(used * 1e9),
            capabilities=tuple(sorted(read_spec(record.spec).capabilities)),
            labels=record.spec["labels"],
        )

    # --- ending ---

    async def end(self, box_id: str, cause: GoneCause) -> bool:
        """End a box; False where it has ended already."""
        box = self.boxes.get(box_id)
        if box is None:
            return False
        ending = self._ending.get(box_id)
        if ending is None:
            if box.cause is None:
                box.cause = cause
            ending = asyncio.get_running_loop().create_task(self._end(box))
            self._ending[box_id] = ending
            ending.add_done_callback(lambda _: self._ending.pop(box_id, None))
        await asyncio.shield(ending)
        return True

    async def _end(self, box: Box) -> None:
        assert box.cause is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(box.pid, signal.SIGKILL)
        await asyncio.wait([box.guest.lost], timeout=5)
        box.guest.close()
        self.journal.end_box(box.id, box.cause)
        await self._remove(box.id)
        self.boxes.pop(box.id, None)
        self._servers.pop(box.id, None)
        for spare in self._spares.pop(box.id, []):
            with contextlib.suppress(HadalError):
                await self.end((await spare).id, GoneCause.KILLED)
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
            if time.monotonic() > deadline:
                raise LaunchError(f"processes of box {box_id} do not end: {cgroup.processes()}")
            await asyncio.sleep(0.002)
        reach("remove.files", writes=False)
        await self.images.release(box_id)
        folder = self._folder / box_id
        if folder.exists():
            await asyncio.to_thread(remove_tree, folder)
        self._slots.pop(box_id, None)
        if self._forked.pop(box_id, None):
            await self._sweep_fork_layers()

    def _watch_guest(self, box: Box) -> None:
        def lost(_: object) -> None:
            box.lost()
            asyncio.get_running_loop().create_task(self.end(box.id, GoneCause.CRASHED))

        box.guest.lost.add_done_callback(lost)

    def _init_exited(self, pid: int, status: int) -> None:
        logger.debug("init of a box ended", extra={"pid": pid, "status": status})

    async def _enforce_lives(self) -> None:
        """End boxes whose time is over, however the clients fare."""
        while True:
            await asyncio.sleep(0.25)
            now, monotonic = time.time_ns(), time.monotonic()
            for box in list(self.boxes.values()):
                busy = any(not c.result.done() for c in box.commands.values())
                box.forget_old_commands()
                if now - box.created_ns > box.spec.ttl_s * 1e9:
                    cause = GoneCause.TTL
                elif not busy and monotonic - box.used > box.spec.idle_s:
                    cause = GoneCause.IDLE
                else:
                    continue
                asyncio.get_running_loop().create_task(self.end(box.id, cause))


def _function_scratch(spec: FunctionSpec) -> tuple[tuple[str, int], ...]:
    """The only places where a call can write; they are emptied after it."""
    return tuple((path, spec.disk_mb << 20) for path in ("/tmp", "/var/tmp", "/home/call"))


def _children(result: Mapping[str, object] | None) -> list[str]:
    boxes = (result or {}).get("boxes")
    return [str(box) for box in cast(list[object], boxes)] if isinstance(boxes, list) else []


def _start_time(pid: int) -> int | None:
    """Return when a process was started, in ticks since boot: with the pid it names the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])

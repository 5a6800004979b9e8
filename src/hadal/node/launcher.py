"""The process that makes boxes: `hadal-guest spawn`, small and with one thread, so that a clone is cheap."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hadal.errors import HadalError, LaunchError
from hadal.node.wire import Event, Fields, Tag, decode_fields, encode_fields

__all__ = ["LaunchRequest", "Launched", "Launcher"]

_MESSAGE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """A box to be made.

    Attributes:
        hostname: Its name for itself.
        layers: Directories of its root, the top one first; read only.
        run_directory: An empty directory of the box on the host; mounts are staged there, seen by the
            box's own processes only.
        socket: Where its guest listens; at most 107 bytes.
        scratch: Directory for what it writes, or a mount of its own, as a descriptor; or
        scratch_bytes: instead a tmpfs of this size, with
        scratch_inodes: so many files.
        uid_base: First id on the host of its 65,536 users; None without a user namespace.
        cgroups: `cgroup.procs` files that it joins.
        network: Path of its network namespace; None for a new one with loopback only.
        shm_bytes: Size of /dev/shm.
        etc: Files written into /etc at start, by name.
        binds: Host path, path in the box, and whether it is read-only.
        tmpfs: Path in the box and size in bytes.
        limits: Resource limits as `name=soft:hard`.
        read_only: Whether its root cannot be written.
        lease_s: Seconds without a node daemon after which it ends itself; 0 for never.
        keep: At most two descriptors for those of its commands that are to have them.
        devices: Of the host that all of its users may open: "kvm", "net/tun".
    """

    hostname: str
    layers: tuple[Path, ...]
    run_directory: Path
    socket: Path
    scratch: Path | int | None = None
    scratch_bytes: int = 0
    scratch_inodes: int = 0
    uid_base: int | None = None
    cgroups: tuple[Path, ...] = ()
    network: Path | None = None
    shm_bytes: int = 64 << 20
    etc: dict[str, bytes] = field(default_factory=dict[str, bytes])
    binds: tuple[tuple[Path, str, bool], ...] = ()
    tmpfs: tuple[tuple[str, int], ...] = ()
    limits: tuple[str, ...] = ()
    read_only: bool = False
    lease_s: int = 0
    keep: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    def fields(self) -> Fields:
        """Return what the launcher is told."""
        fields: dict[Tag, int | bytes | list[int | bytes]] = {
            Tag.HOSTNAME: self.hostname.encode(),
            Tag.LOWER: [os.fsencode(p) for p in self.layers],
            Tag.RUN_DIRECTORY: os.fsencode(self.run_directory),
            Tag.SOCKET: os.fsencode(self.socket),
            Tag.SHM_BYTES: self.shm_bytes,
            Tag.VOLATILE: 1,
            Tag.READ_ONLY: int(self.read_only),
            Tag.LEASE_S: self.lease_s,
            Tag.CGROUP: [os.fsencode(p) for p in self.cgroups],
            Tag.FILE: [name.encode() + b"\0" + data for name, data in self.etc.items()],
            Tag.BIND: [
                b"\0".join([os.fsencode(source), target.encode(), b"ro" if fixed else b"rw"])
                for source, target, fixed in self.binds
            ],
            Tag.TMPFS: [f"{target}\0{size}".encode() for target, size in self.tmpfs],
            Tag.DEVICE: [name.encode() for name in self.devices],
            Tag.RLIMIT: [limit.encode() for limit in self.limits],
        }
        if isinstance(self.scratch, Path):
            fields[Tag.SCRATCH] = os.fsencode(self.scratch)
        elif self.scratch is None:
            fields[Tag.SCRATCH_BYTES] = self.scratch_bytes
            fields[Tag.SCRATCH_INODES] = self.scratch_inodes
        if self.keep:
            fields[Tag.KEEP] = len(self.keep)
        if self.uid_base is not None:
            fields[Tag.UID_BASE] = self.uid_base
            fields[Tag.UID_COUNT] = 65536
        if self.network is not None:
            fields[Tag.NETNS] = os.fsencode(self.network)
        return fields


@dataclass(frozen=True)
class Launched:
    """A box that runs.

    Attributes:
        pid: Of its init, on the host.
        elapsed_us: Microseconds that the launcher took.
    """

    pid: int
    elapsed_us: int


class Launcher:
    """One launcher process. Boxes do not end with it.

    Args:
        program: The guest program.
        on_exit: Called with pid and wait status when the init of a box has ended.
    """

    def __init__(self, program: Path, on_exit: Callable[[int, int], None]) -> None:
        self._program = program
        self._on_exit = on_exit
        self._waiting: dict[int, asyncio.Future[Launched]] = {}
        self._pids: dict[int, int] = {}
        self._ready: dict[int, int] = {}
        self._next = 1
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the process; needs a running event loop.

        Raises:
            LaunchError: The program cannot be run.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [self._program, "spawn", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise LaunchError(f"cannot run the guest program {self._program}: {error}") from error
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)

    async def launch(self, request: LaunchRequest) -> Launched:
        """Make a box and wait until its guest listens.

        Raises:
            LaunchError: The step that failed, and why.
        """
        if self._socket is None:
            raise LaunchError("the launcher does not run")
        number = self._next
        self._next += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        message = encode_fields({Tag.REQUEST: number, **request.fields()})
        try:
            disk = [request.scratch] if isinstance(request.scratch, int) else []
            await self._send(message, [*disk, *request.keep])
            return await future
        except OSError as error:
            raise LaunchError(
                f"the launcher takes no request of {len(message)} bytes: {error}"
            ) from error
        finally:
            self._waiting.pop(number, None)
            self._pids.pop(number, None)
            self._ready.pop(number, None)

    async def _send(self, message: bytes, descriptors: list[int]) -> None:
        assert self._socket is not None
        while True:
            try:
                socket.send_fds(self._socket, [message], descriptors)
            except BlockingIOError:
                await asyncio.sleep(
                    0.001
                )  # it is making boxes; there is no better sign to wait for
            else:
                return

    def _receive(self) -> None:
        assert self._socket is not None
        while True:
            try:
                message = self._socket.recv(_MESSAGE_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                message = b""
            if not message:
                self._fail_all()
                return
            self._handle(decode_fields(message))

    def _handle(self, fields: dict[int, bytes]) -> None:
        def number(tag: Tag) -> int:
            return int.from_bytes(fields.get(tag, b""), "little")

        request = number(Tag.REQUEST)
        waiting = self._waiting.get(request)
        match number(Tag.EVENT):
            # The box and the launcher report on their own: either may be first.
            case Event.CLONED:
                self._pids[request] = number(Tag.PID)
                self._launched(request)
            case Event.READY:
                self._ready[request] = number(Tag.ELAPSED_US)
                self._launched(request)
            case Event.FAILED if waiting is not None and not waiting.done():
                reason = os.strerror(number(Tag.ERRNO))
                phase = fields.get(Tag.PHASE, b"?").decode(errors="replace")
                what = fields.get(Tag.TEXT, b"").decode(errors="replace")
                waiting.set_exception(LaunchError(f"cannot make a box: {phase}: {what}: {reason}"))
            case Event.EXITED:
                self._exited(number(Tag.PID), number(Tag.STATUS))
            case _:
                pass  # of a launch that nobody waits for any more

    def _launched(self, request: int) -> None:
        waiting = self._waiting.get(request)
        if waiting is None or waiting.done():
            return
        if request in self._pids and request in self._ready:
            waiting.set_result(Launched(self._pids[request], self._ready[request]))

    def _exited(self, pid: int, status: int) -> None:
        for request, known in self._pids.items():
            waiting = self._waiting.get(request)
            if known == pid and waiting is not None and not waiting.done():
                text = f"cannot make a box: its init ended with status {status:#x}"
                waiting.set_exception(LaunchError(text))
        self._on_exit(pid, status)

    def _fail_all(self) -> None:
        self.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LaunchError("the launcher has ended"))

    def close(self) -> None:
        """End the process; boxes stay."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired as error:
                self._process.kill()
                raise HadalError("the launcher does not end") from error
            self._process = None

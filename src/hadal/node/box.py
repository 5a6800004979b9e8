"""A box that lives on this node: its guest, its limits, and the commands in it, each written down first."""

import asyncio
import base64
import contextlib
import errno
import os
import signal
import time
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hadal.errors import (
    CommandRefusedError,
    GoneCause,
    JournalError,
    SandboxFileError,
    SandboxGoneError,
    UnsupportedError,
)
from hadal.node.blobs import Blobs
from hadal.node.cgroups import Cgroup
from hadal.node.command import (
    Command,
    file_error,
    recorded_result,
    refusal_of,
    result_fields,
    result_of,
)
from hadal.node.guest import Guest, GuestLostError
from hadal.node.guest_command import CommandOrder, Exit
from hadal.node.journal import INLINE_BYTES, BoxRecord, Journal, Record
from hadal.node.machines.machine import Machine
from hadal.node.nap import Nap
from hadal.node.orders import ImageDefaults, order_of
from hadal.node.output import Output, Passage
from hadal.node.processes import is_alive
from hadal.node.stillness import Stillness
from hadal.sandbox.protocol import CommandRequest, command_record
from hadal.sandbox.specs import Capability, Spec

_ANSWER_BYTES = 16 << 20
"""Of an operation on files that is answered whole: some 100,000 entries of a directory."""
_LOOK_S = 60.0
"""Between two looks at whether its time is over, at most: clocks are set, too."""

__all__ = ["Box"]


class Box:
    """A living box. Made by `Node`, which also ends it.

    Attributes:
        id, name: What the node and the caller call it.
        spec: What was asked for.
        pid: Of its init, on the host; of no process while it sleeps.
        nap: Its sleep; None where it is not asleep.
        disk: Number of the device that has what it wrote; -1 where that is a machine's own.
        machine: That it is in; None where it shares the node's kernel.
        used: When somebody last asked something of it; monotonic seconds.
        look_again: Before then `overdue` need not be asked; monotonic seconds.
        cause: Set before its end by whoever ends it.
        not_before: When it may be paused for want of use, having refused to be; monotonic seconds.
    """

    def __init__(
        self, *, record: BoxRecord, spec: Spec, defaults: ImageDefaults, folder: Path, cgroup: Cgroup,
        journal: Journal, blobs: Blobs, pid: int, guest: Guest, disk: int, machine: Machine | None,
    ) -> None:  # fmt: skip
        self.id = record.id
        self.name = record.name
        self.created_ns = record.created_ns
        self.spec = spec
        self.defaults = defaults
        self.folder = folder
        self.cgroup = cgroup
        self.pid = pid
        self.guest = guest
        self.disk = disk
        self.machine = machine
        self.used = time.monotonic()
        self.look_again = 0.0
        self.cause: GoneCause | None = None
        self.nap: Nap | None = None
        self.not_before = 0.0
        self._given_back = False
        self._uses = 0
        self._stillness = Stillness(cgroup)
        self.commands: dict[str, Command] = {}
        self._journal = journal
        self._blobs = blobs
        self._position = journal.last_position(record.id)
        self._oom_kills = cgroup.oom_kills()
        self._tasks: set[asyncio.Task[None]] = set()
        self._guest_id = guest.last_id

    def become(self, record: BoxRecord, spec: Spec) -> None:
        """Be the box of a request, having been nobody's.

        Args:
            record: As the journal has it now.
            spec: What was asked for.
        """
        self.name, self.created_ns, self.spec = record.name, record.created_ns, spec
        self.used, self.look_again = time.monotonic(), 0.0

    # --- commands ---

    def touch(self) -> None:
        """Note that somebody uses it. If it sleeps it wakes, and does what it is told from now on.

        Raises:
            SandboxGoneError: It has ended.
            NoCapacityError: It sleeps, and there is no memory for it.
        """
        self.used = time.monotonic()
        if self.cause is not None or self.guest.lost.done():
            raise self.gone()
        self.resume()

    async def awake(self) -> None:
        """Note that somebody uses it, and return when it does not sleep: when its hypervisor is there, too.

        Raises:
            SandboxGoneError: It has ended, or does not wake.
            NoCapacityError: There is no memory for it.
        """
        self.touch()
        while self.nap is not None:
            await self.nap.wait()
            self.touch()

    @contextlib.contextmanager
    def in_use(self) -> Generator[None]:
        """A block in which it is used, whether or not anything is asked of it meanwhile."""
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            self.used = time.monotonic()

    def overdue(self) -> GoneCause | None:
        """Return why its time is over, if it is, and note when that has to be asked again."""
        left = self.spec.ttl_s - (time.time_ns() - self.created_ns) / 1e9
        if left < 0:
            return GoneCause.TTL
        now, unused = time.monotonic(), self._unused_s()
        if unused > self.spec.idle_s:
            return GoneCause.IDLE
        pause_s = _LOOK_S if self.spec.pause_s is None else max(0.0, self.spec.pause_s - unused)
        self.look_again = now + min(left, self.spec.idle_s - unused, pause_s, _LOOK_S)
        return None

    def _unused_s(self) -> float:
        """Return for how many seconds nobody has used it; 0 while a command runs."""
        is_idle = all(c.result.done() for c in self.commands.values())
        return time.monotonic() - self.used if is_idle else 0.0

    def is_drowsy(self) -> bool:
        """Return whether it is to be paused, for want of use."""
        after = self.spec.pause_s
        if after is None or self._uses or self._given_back or self.nap is not None:
            return False
        return self._unused_s() >= after and time.monotonic() >= self.not_before

    def require(self, capability: Capability) -> None:
        """Refuse what this kind of box cannot do.

        Raises:
            UnsupportedError: It cannot.
        """
        if capability not in self.spec.can:
            can = ", ".join(sorted(self.spec.can))
            what = f"a box of backend {self.spec.backend}"
            if capability in self.spec.capabilities:
                what += " without a guest program"
            raise UnsupportedError(f"{what} has no {capability}", hint=f"it has: {can}")

    @property
    def paused(self) -> bool:
        """Whether its processes stand still until somebody asks something of it."""
        return self._stillness.paused

    async def pause(self, *, reclaim: bool = False) -> None:
        """Stop every process of it, until `resume` or any other request, also of another daemon.

        Args:
            reclaim: Whether the kernel takes of its memory what it can.

        Raises:
            JournalError: It cannot be written down; it runs on.
            SandboxGoneError: It has ended.
            UnsupportedError: It does not stop; it runs on.
        """
        self._journal.set_state(self.id, "paused")
        self._given_back |= reclaim
        try:
            await self._stillness.pause()
        except OSError:
            raise self.gone() from None  # its groups are not there any more
        except UnsupportedError:
            self._given_back = False
            self._journal.set_state(self.id, "running")
            raise
        if reclaim and self.paused:
            await asyncio.to_thread(self.cgroup.reclaim)

    def resume(self) -> None:
        """Let its processes go on, where it is paused; where it sleeps it begins to wake.

        Raises:
            NoCapacityError: It sleeps, and there is no memory for it.
        """
        if self.paused:
            self._journal.set_state(self.id, "running")
            self._stillness.resume()
        self._given_back = False
        if self.nap is not None:
            self.nap.end()

    def kill(self) -> None:
        """Kill its first process, and all others with it; while it sleeps there is none."""
        if self.nap is None or not self.nap.sleeps:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self.nap is not None:
            self.guest.give_up("the box has ended while it slept")
        with contextlib.suppress(OSError):
            self.cgroup.thaw()  # what is frozen does not even die

    def held_still(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Return a block in which no process of it runs, so that its files are of one moment."""
        return self._stillness.held()

    async def let_go(self) -> None:
        """End the connections to it; it lives on."""
        self.guest.close()
        if self.machine is not None:
            await self.machine.close()

    def gone(self) -> SandboxGoneError:
        """Return the error that says why it is no more."""
        cause = self.cause or GoneCause.CRASHED
        return SandboxGoneError(f"box {self.id} is gone: {_REASONS[cause]}", cause=cause)

    def next_guest_id(self) -> int:
        """Return a number for a command that the guest has not seen."""
        self._guest_id += 1
        return self._guest_id

    def begin(
        self, kind: str, request: Mapping[str, Any], *, request_id: str, guest_id: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> int:  # fmt: skip
        """Write down what is about to be done, at the next place of the log, and return the place.

        Raises:
            JournalError: It cannot be written down: then it must not be done.
        """
        position = self._position + 1
        try:
            self._journal.begin(
                self.id,
                position,
                kind,
                request,
                request_id=request_id,
                guest_id=guest_id,
                details=details,
            )
        except JournalError:
            self._position = self._journal.last_position(self.id)
            raise
        self._position = position
        return position

    async def start(self, request: CommandRequest) -> Command:
        """Write a command down and start it; the same request again returns the same command.

        Raises:
            JournalError: It cannot be written down; it does not run.
            SandboxGoneError: The box has ended.
        """
        known = self.commands.get(request.request_id)
        if known is not None:
            if known.unwritten is not None:
                known.unwritten()
            return known
        record = self._journal.record_of_request(self.id, request.request_id)
        if record is not None and record.event.state == "begun" and record.event.kind == "command":
            # Every command that runs is in `commands`: this one was written down, and then something
            # failed before it was given to the guest.
            self.touch()
            return await self._run_now(record)
        if record is not None:
            return self.recorded(record)
        self.require(Capability.COMMANDS)
        self.touch()
        guest_id = self.next_guest_id()
        position = self.begin(
            "command", self._recordable(request), request_id=request.request_id, guest_id=guest_id,
            details=_details(request),
        )  # fmt: skip
        command = self._execute(position, guest_id, order_of(request, self.spec, self.defaults))
        self.commands[request.request_id] = command
        if request.stdin is not None:
            await self._give(command, request.stdin)
        return command

    def _new_command(self, position: int, *, resume: bool = False) -> Command:
        def acknowledge(stdout: int, stderr: int) -> None:
            if command.guest is not None:
                command.guest.acknowledge(stdout, stderr)

        output = Output(self.folder, f"out-{position}", acknowledge, resume=resume)
        command = Command(position, output, None)
        return command

    def _execute(self, position: int, guest_id: int, order: CommandOrder) -> Command:
        command = self._new_command(position)
        kills = self.cgroup.oom_kills()
        command.guest = self.guest.execute(guest_id, order, command.output)
        self._spawn(self._complete(command, kills))
        return command

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give(self, command: Command, data: bytes) -> None:
        assert command.guest is not None
        with contextlib.suppress(GuestLostError):
            await command.guest.write(data)
            command.guest.end_input()

    def recorded(self, record: Record) -> Command:
        """Return a command as the journal has it; one that did not end there has an error for a result."""
        command = Command(
            record.event.position, Output(self.folder, "none", lambda _stdout, _stderr: None), None
        )
        if record.event.state == "done" and record.event.kind == "command":
            result = recorded_result(record, self._blobs)
            command.output.output(1, 0, result.stdout_bytes)
            command.output.output(2, 0, result.stderr_bytes)
            command.output.finish()
            command.result.set_result(result)
        else:
            command.fail(refusal_of(record))
        return command

    def _recordable(self, request: CommandRequest) -> dict[str, Any]:
        if request.stdin is not None:
            self._blobs.put(request.stdin)
        return command_record(request.model_dump(exclude_defaults=True), request.stdin)

    async def _complete(self, command: Command, kills: int) -> None:
        assert command.guest is not None
        try:
            ended = await command.guest.ended
            self.used = time.monotonic()
        except CommandRefusedError as error:
            self._journal.end(
                self.id,
                command.position,
                "refused",
                {"message": error.message, "errno": error.errno},
            )
            command.fail(error)
        except GuestLostError:
            await self.guest.lost
            await asyncio.sleep(0)  # the node says why first
            command.fail(self.gone())
        else:
            oom = ended.oom_kills > 0 or self.cgroup.oom_kills() > kills
            command.output.finish()
            command.unwritten = lambda: self._write_end(command, ended, oom)
            with contextlib.suppress(JournalError):  # the next request for it tries again
                command.unwritten()

    def _write_end(self, command: Command, ended: Exit, oom: bool) -> None:
        """Write the end of a command down; only then is it told, and the guest forgets it."""
        stdout, stderr = command.output.whole(1), command.output.whole(2)
        result = result_of(ended, oom, stdout, stderr, command.position)
        fields = result_fields(result)
        inline: dict[str, bytes] = {"stdout": stdout, "stderr": stderr}
        kept: dict[int, Path] = {}
        try:
            for number, (name, data) in enumerate(list(inline.items()), 1):
                if len(data) > INLINE_BYTES:
                    blob = self._blobs.put(data)
                    kept[number] = self._blobs.path(blob.digest)
                    fields[f"{name}_blob"] = blob.digest
                    inline[name] = b""
            self._journal.end(self.id, command.position, "done", fields, **inline)
        except JournalError as error:
            if not command.result.done():
                command.result.set_exception(error)
                command.result.exception()
            raise
        command.unwritten = None
        if command.result.done():
            command.result = asyncio.get_running_loop().create_future()
        command.result.set_result(result)
        assert command.guest is not None
        command.guest.forget()
        command.output.close(kept)
        self._forget_old_commands()

    def _forget_old_commands(self, keep: int = 256) -> None:
        """Drop ended commands from memory, the oldest first; the journal has them."""
        if len(self.commands) < 2 * keep:
            return
        ended = [key for key, c in self.commands.items() if c.result.done() and c.unwritten is None]
        for key in ended[: max(0, len(ended) - keep)]:
            del self.commands[key]

    # --- after a restart of the daemon ---

    async def reconcile(self, known: dict[int, bool] | None = None) -> None:
        """Ask the guest about every command whose end the journal does not know.

        Commands that only the guest knows are another's: operations of an earlier daemon, or, in a copy of
        a machine, commands of the one that was copied. They run on by themselves.

        Args:
            known: The commands that the guest knows, where it cannot be asked.
        """
        if known is None:
            known = await self.guest.list()
        for record in self._journal.begun(self.id):
            if record.event.kind != "command":
                continue  # the node knows what to do about those
            if record.guest_id in known:
                del known[record.guest_id]
                self._adopt(record)
            else:
                await self._run_now(record)
        for number in known:
            self.guest.leave(number)

    async def _run_now(self, record: Record) -> Command:
        """Run a command that was written down and never reached the guest."""
        request = self._request_of(record)
        guest_id = self.next_guest_id()
        self._journal.set_guest_id(self.id, record.event.position, guest_id)
        command = self._execute(
            record.event.position, guest_id, order_of(request, self.spec, self.defaults)
        )
        self.commands[record.request_id] = command
        if request.stdin is not None:
            await self._give(command, request.stdin)
        return command

    def _request_of(self, record: Record) -> CommandRequest:
        fields: dict[str, Any] = {**record.event.request, "request_id": record.request_id}
        if "stdin" in fields:
            fields["stdin"] = base64.b64encode(self._blobs.read(fields["stdin"]))
        return CommandRequest.model_validate(fields)

    def _adopt(self, record: Record) -> None:
        assert record.guest_id is not None
        command = self._new_command(record.event.position, resume=True)
        offsets = command.output.offsets()
        command.guest = self.guest.attach(record.guest_id, command.output, *offsets)
        self.commands[record.request_id] = command
        self._spawn(self._complete(command, self.cgroup.oom_kills()))

    # --- what the guest does itself ---

    async def applet(
        self, *arguments: str | bytes, user: str | None = None, stdin: bytes | None = None
    ) -> bytes:
        """Run an operation on files in the guest and return what it says.

        Raises:
            SandboxFileError: It failed; with the reason of the system.
        """
        with self.open_applet(*arguments, user=user, stdin=stdin is not None) as running:
            if stdin is not None:
                await self._give(running, stdin)
            answer = bytearray()
            async for chunk in self.applet_output(running, arguments):
                answer += chunk
                if len(answer) > _ANSWER_BYTES:
                    raise SandboxFileError(
                        errno.EOVERFLOW, os.fsdecode(arguments[1]), hint="ask for a part of it"
                    )
            return bytes(answer)

    @contextlib.contextmanager
    def open_applet(
        self, *arguments: str | bytes, user: str | None = None, stdin: bool = False, kept: bool = False
    ) -> Any:  # fmt: skip
        """Start an operation whose input or output is a stream; it ends with the block.

        Args:
            arguments: Its name, and what it is told.
            user: Who does it. Default: who runs the commands of the box.
            stdin: Whether it has input.
            kept: As `CommandOrder.kept`.
        """
        self.require(Capability.COMMANDS)
        self.touch()
        order = CommandOrder(
            arguments=[os.fsencode(a) for a in arguments], applet=True, stdin=stdin, kept=kept,
            user=user or self.spec.user or self.defaults.user,
        )  # fmt: skip

        def acknowledge(stdout: int, stderr: int) -> None:
            if running.guest is not None:
                running.guest.acknowledge(stdout, stderr)

        number = self.next_guest_id()
        running = Command(0, Passage(acknowledge), None)
        running.guest = guest = self.guest.execute(number, order, running.output)
        guest.ended.add_done_callback(lambda _: running.output.finish())
        try:
            with self.in_use():
                yield running
        finally:
            if not guest.ended.done():
                guest.signal(signal.SIGKILL)
                guest.ended.add_done_callback(lambda _: guest.forget())
            else:
                guest.forget()
            running.output.close()

    async def applet_output(
        self, running: Command, arguments: Sequence[str | bytes]
    ) -> AsyncIterator[bytes]:
        """Yield what an operation says; afterwards it has succeeded."""
        assert running.guest is not None
        async for stream, _, data in running.output.follow():
            if stream == 1:
                yield data
        try:
            ended = await running.guest.ended
        except GuestLostError:
            await self.guest.lost
            await asyncio.sleep(0)
            raise self.gone() from None
        if ended.status:
            raise file_error(ended, running.output.whole(2), arguments)

    def lost(self) -> GoneCause:
        """Return why the guest is gone, where nobody here ended it."""
        if self.cause is None:
            with contextlib.suppress(OSError):
                if self.cgroup.oom_kills() > self._oom_kills and not is_alive(self.pid):
                    self.cause = GoneCause.OOM
        if self.cause is None:
            wakes = self.nap is not None and self.nap.wakes
            self.cause = GoneCause.NOT_WOKEN if wakes else GoneCause.CRASHED
        return self.cause


_REASONS = {
    GoneCause.OOM: "its memory ran out and its first process was killed",
    GoneCause.TTL: "its lifetime is over",
    GoneCause.IDLE: "nobody has used it for too long",
    GoneCause.KILLED: "it was removed",
    GoneCause.NODE_LOST: "its node has lost it",
    GoneCause.CRASHED: "its first process was killed from outside",
    GoneCause.NOT_WOKEN: "it was paused, and what was kept of its memory could not be run again",
    GoneCause.NOT_FOUND: "this node does not know it",
}


def _details(request: CommandRequest) -> dict[str, Any]:
    return request.model_dump(
        include={"timeout_s", "quiet_s", "output_limit"}, exclude_defaults=True
    )

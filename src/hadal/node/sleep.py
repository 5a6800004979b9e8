"""Sleep: boxes that stand still, and whose memory others have meanwhile. Any request ends it.

What a container has in memory is given to the kernel to take. A machine is kept as a snapshot in the folder of its
box, then its hypervisor ends; it wakes as the machine that it was, in a new jail, on the same disk and with the same
network. The record of the box says which of the two is true: with `asleep` in it, the snapshot is the machine, and
whatever process there is of it is none; without, the process is, and what is kept is nothing. So a daemon can die at
any point. What the guest of a machine is sent meanwhile waits in the connection to it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadal.errors import (
    GoneCause,
    HadalError,
    JournalError,
    LaunchError,
    NoCapacityError,
    NodeError,
)
from hadal.node.box import Box
from hadal.node.faults import reach
from hadal.node.guest import Guest
from hadal.node.journal import BoxRecord
from hadal.node.launch_request import launch_request
from hadal.node.machines.asleep import Slept, forget_asleep
from hadal.node.machines.machine import Machine
from hadal.node.nap import Nap
from hadal.node.processes import start_time
from hadal.node.slots import limits_of, memory_mb
from hadal.sandbox.specs import Capability, MachineSpec, read_spec

if TYPE_CHECKING:
    from hadal.node.node import Node

__all__ = ["Sleep"]

_LOG = logging.getLogger(__name__)
_END_S = 10.0
_TRIES_S = (0.2, 2.0)
"""Between attempts to wake one."""
_AGAIN_S = 60.0
"""After it could not be paused, for want of use."""


class Sleep:
    """That of a node's boxes.

    Args:
        node: Whose.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Wait for boxes that are about to sleep or to wake."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def leave(self, box: Box) -> None:
        """Do no more with a box, which ends."""
        task = self._tasks.get(box.id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def begin(self, box: Box) -> None:
        """Let a box stand still and give its memory back, until any request.

        Raises:
            NodeError: A machine cannot be kept, for want of space on the disk, or does not answer; it runs on.
            JournalError: It cannot be written down; it runs on.
            UnsupportedError: It does not stop; it runs on.
            SandboxGoneError: It has ended.
        """
        if box.machine is None or Capability.COMMANDS not in box.spec.can:
            await box.pause(
                reclaim=True
            )  # also where no guest program could hold commands, or take the time
            return
        while box.id in self._tasks and (box.nap is None or box.nap.is_over):
            await asyncio.wait([self._tasks[box.id]])  # it wakes
        if box.nap is None:
            if box.cause is not None or box.guest.lost.done():
                raise box.gone()
            box.resume()  # stopped, it cannot even hold its commands
            nap = box.nap = self._new_nap(box)
            self._do(box, self._fall_asleep(box, nap))
        if (task := self._tasks.get(box.id)) is not None:
            await asyncio.wait([task])
            if task.cancelled():
                raise box.gone()
            task.result()

    async def begin_unasked(self, box: Box) -> None:
        """The same for a box that nobody uses; where it cannot be, it is said and tried again later."""
        try:
            await self.begin(box)
        except HadalError as error:
            _LOG.warning("not paused: %s", error, extra={"sandbox_id": box.id})
            box.not_before = time.monotonic() + _AGAIN_S

    def _new_nap(self, box: Box) -> Nap:
        return Nap(lambda: self._begin_to_wake(box))

    def _do(self, box: Box, work: Coroutine[None, None, None]) -> None:
        task = self._tasks[box.id] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda done: self._forget(box.id, done))

    def _forget(self, box_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(box_id) is task:
            del self._tasks[box_id]
        if not task.cancelled():
            task.exception()  # whoever asked for it has seen it

    # --- falling asleep ---

    async def _fall_asleep(self, box: Box, nap: Nap) -> None:
        node = self._node
        assert box.machine is not None
        assert isinstance(box.spec, MachineSpec)
        try:
            root = node.base_of(box)[0]
            kind = await asyncio.to_thread(node.machines.kind, box.spec, root)
            sleeps = await node.machines.lay_down(
                box.machine, box.guest, box.cgroup, box.pid,
                lambda known: self._decide(box, nap, kind, known),
            )  # fmt: skip
            if sleeps:
                reach("asleep.written")
                await self._end_processes(box)
                await asyncio.to_thread(box.cgroup.reclaim)  # of files that it had opened
                nap.sleeps = True  # whoever asks something of it from here on wakes it
        except NodeError:
            if self._is_written(box):  # its hypervisor does not end: nobody knows what it does
                node.begin_end(box.id, GoneCause.CRASHED)
            raise
        finally:
            if not nap.sleeps:
                self._finish(box, nap)
        if not nap.sleeps:
            return
        node.slots.rest(box.id)
        _LOG.info("box sleeps", extra={"sandbox_id": box.id})
        if nap.is_over:  # somebody has asked something of it when it was too late
            nap.is_over = False
            nap.end()

    def _decide(self, box: Box, nap: Nap, kind: str, known: dict[int, bool]) -> bool:
        """Write down that a machine sleeps, unless somebody has asked something of it."""
        record = self._node.journal.box(box.id)
        if nap.is_over or box.cause is not None or record is None:
            return False
        slept = Slept(
            kind=kind, boot_id=box.guest.boot_id, last_id=box.next_guest_id(),
            known=sorted(known), has_port=box.guest.has_port,
        )  # fmt: skip
        runtime = record.runtime | {"asleep": asdict(slept)}
        self._write_down(record, "paused", runtime)
        return True

    def _write_down(self, record: BoxRecord, state: str, runtime: dict[str, Any]) -> None:
        """Write down which of the two is true, its process or what was kept; or leave it as it is written."""
        journal = self._node.journal
        try:
            journal.set_box(record.id, state=state, runtime=runtime)
        except JournalError:
            with contextlib.suppress(JournalError):  # if it is written, it is not any more
                journal.set_box(record.id, state="running", runtime=record.runtime)
            raise

    def _is_written(self, box: Box) -> bool:
        record = self._node.journal.box(box.id)
        return record is not None and "asleep" in record.runtime

    async def _end_processes(self, box: Box) -> None:
        """End the hypervisor of a machine with its jail; groups, network and disk stay."""
        deadline = time.monotonic() + _END_S
        while processes := box.cgroup.processes():
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise NodeError(f"the hypervisor of box {box.id} does not end: {processes}")
            await asyncio.sleep(0.002)

    def _finish(self, box: Box, nap: Nap) -> None:
        if box.nap is nap:
            box.nap = None
        nap.finish()

    # --- waking ---

    def _begin_to_wake(self, box: Box) -> None:
        node = self._node
        assert box.nap is not None
        node.slots.rise(box.id, memory_mb(box.spec))
        try:
            node.journal.set_state(box.id, "running")
        except HadalError:
            node.slots.rest(box.id)
            raise
        self._do(box, self._wake(box, box.nap))

    async def _wake(self, box: Box, nap: Nap) -> None:
        try:
            await self._try_to_restore(box, nap)
        except (HadalError, OSError) as error:
            _LOG.warning("box does not wake: %s", error, extra={"sandbox_id": box.id})
            self._node.begin_end(box.id, GoneCause.NOT_WOKEN)
        finally:
            self._finish(box, nap)
        if box.cause is None:
            _LOG.info("box has woken", extra={"sandbox_id": box.id})
            await asyncio.to_thread(forget_asleep, box.folder)  # large files take their time

    async def _try_to_restore(self, box: Box, nap: Nap) -> None:
        """Restore a machine; what may be otherwise a little later is tried again."""
        for again_s in _TRIES_S:
            try:
                await self._restore(box, nap)
            except (JournalError, LaunchError, OSError) as error:
                if not nap.sleeps or box.cause is not None:
                    raise  # it has run, or it is not to any more
                _LOG.warning("it is tried again: %s", error, extra={"sandbox_id": box.id})
            else:
                return
            await self._end_processes(box)
            await asyncio.sleep(again_s)
        await self._restore(box, nap)

    async def _restore(self, box: Box, nap: Nap) -> None:
        node, record = self._node, self._node.journal.box(box.id)
        assert record is not None
        assert box.machine is not None
        assert isinstance(box.spec, MachineSpec)
        slept = Slept(**record.runtime["asleep"])
        network = await node.networks.take_again(box.id)
        try:
            root = node.base_of(box)[0]
            jail = launch_request(
                box.folder, box.spec, layers=root.layers, binds=root.binds, cgroup=box.cgroup, network=network,
                uid_base=node.uid_base(record.runtime["slot"]), lease_s=node.config.lease_s,
            )  # fmt: skip
            machine = await node.machines.wake(
                box.spec, root, box.folder, jail, network, slept, box.guest,
                lambda pid: self._note_that_it_runs(box, nap, pid),
            )  # fmt: skip
        finally:
            if network.tap is not None:
                os.close(network.tap)
        box.machine.jail, box.machine.control = machine.jail, machine.control

    def _note_that_it_runs(self, box: Box, nap: Nap, pid: int) -> None:
        """Write down that from now on the process of a machine is the machine."""
        record = self._node.journal.box(box.id)
        if box.cause is not None or record is None:
            raise box.gone()
        reach("waking.restored")
        runtime = {key: value for key, value in record.runtime.items() if key != "asleep"}
        runtime |= {"pid": pid, "pid_start": start_time(pid)}
        self._write_down(record, "running", runtime)
        box.pid, nap.sleeps = pid, False

    # --- after a restart of the daemon ---

    def find(self, record: BoxRecord, folder: Path) -> tuple[Machine, Guest]:
        """Return what there is of a machine that sleeps.

        Args:
            record: Of its box.
            folder: Of that.
        """
        slept = Slept(**record.runtime["asleep"])
        spec, cgroup = read_spec(record.spec), self._node.cgroups.of(record.id)
        cgroup.create(limits_of(spec))  # where the host was started anew there are none
        guest = Guest.parted(slept.boot_id, slept.last_id, port=slept.has_port)
        return Machine(None, None, folder / "vm"), guest

    async def take_up(self, box: Box, record: BoxRecord) -> None:
        """Let a box that was found sleep on, or wake where it was about to; whatever process it has is none of it.

        Raises:
            NodeError: There is one, and it does not end.
        """
        slept = Slept(**record.runtime["asleep"])
        nap = box.nap = self._new_nap(box)
        await self._end_processes(box)
        nap.sleeps = True
        self._node.slots.rest(box.id)
        await box.reconcile(dict.fromkeys(slept.known, False))
        if record.state == "running":
            with contextlib.suppress(NoCapacityError):  # who asked for it asks again
                box.touch()

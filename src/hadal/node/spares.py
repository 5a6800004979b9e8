"""Machines that are started before anybody asks for them, where a spec has `spare`.

A spare is a box like any other, of which nobody has been told. Who asks for one like it is given it: the box gets
the name, the trajectory and the spec of the request. It has run a command, so that an emulator has translated
what every command needs. What nobody asks for in time ends as other boxes do; a node that starts again ends them.
"""

import asyncio
import json
import logging
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from hadal.errors import GoneCause, HadalError, JournalError
from hadal.node.box import Box
from hadal.node.guest_command import CommandOrder, Unread
from hadal.node.machines.disk_images import is_disk_image
from hadal.sandbox.protocol import CreateRequest
from hadal.sandbox.specs import MachineSpec

if TYPE_CHECKING:
    from hadal.node.node import Node

__all__ = ["Spares"]

_LOG = logging.getLogger(__name__)
_IDLE_S = 300.0
_OF_THE_CALLER = {
    "env", "labels", "ttl_s", "idle_s", "pause_s", "working_dir", "user", "nofile", "spare",
}  # fmt: skip
"""Fields that make no other machine: they count when a command begins, or to the node."""


class Spares:
    """Those of a node.

    Args:
        node: Whose boxes.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._ready: dict[str, list[str]] = {}
        self._making: dict[str, set[asyncio.Task[None]]] = {}
        self._untold: set[str] = set()

    async def close(self) -> None:
        """Make no more."""
        tasks = [task for making in self._making.values() for task in making]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def give(self, request: CreateRequest, spec: MachineSpec) -> Box | None:
        """Return a spare as the box of a request, and see that others are made; None where there is none.

        Args:
            request: Of a box that there is not.
            spec: Of it.

        Raises:
            ConfigError, ImageError: As where a box is made: what it is to start from is not there, or not like it.
            JournalError: It cannot be written down whose it is; it ends.
        """
        kind = _kind(spec)
        box = self._take(kind, await self._base_of(spec)) if self._ready.get(kind) else None
        try:
            if box is not None:
                self._hand_over(box, request, spec)
        finally:
            self.refill(spec)
        return box

    def refill(self, spec: MachineSpec) -> None:
        """See that as many are made as a spec wants to be ready."""
        kind = _kind(spec)
        ready, making = self._ready.setdefault(kind, []), self._making.setdefault(kind, set())
        ready[:] = [box for box in ready if self._living(box) is not None]
        self._untold &= self._node.boxes.keys()
        for _ in range(spec.spare - len(ready) - len(making)):
            task = asyncio.get_running_loop().create_task(self._make(kind, spec))
            making.add(task)
            task.add_done_callback(making.discard)

    def has(self, box_id: str) -> bool:
        """Return whether a box is one that nobody has been told of."""
        return box_id in self._untold

    async def _base_of(self, spec: MachineSpec) -> str:
        """Return what a machine would stand on that is started now: a digest, a directory, or a disk image."""
        reference = await self._node.image_of(spec)
        if is_disk_image(reference):
            return reference
        async with self._node.images.using(reference) as root:
            return root.digest or root.name

    def _take(self, kind: str, base: str) -> Box | None:
        """Return one that stands on this; those that stand on what the name of it meant before end."""
        ready = self._ready.get(kind, [])
        while ready:
            box = self._living(ready.pop(0))
            if box is None:
                continue
            root, _ = self._node.base_of(box)
            if (root.digest or root.name) == base:
                return box
            self._node.begin_end(box.id, GoneCause.KILLED)
        return None

    def _living(self, box_id: str) -> Box | None:
        box = self._node.boxes.get(box_id)
        gone = box is None or box.cause is not None or box.guest.lost.done()
        return None if gone else box

    def _hand_over(self, box: Box, request: CreateRequest, spec: MachineSpec) -> None:
        journal = self._node.journal
        record = journal.box(box.id)
        assert record is not None
        record = replace(
            record, request_id=request.request_id, name=request.name, trajectory=request.trajectory,
            spec=spec.model_dump(mode="json", by_alias=True), created_ns=time.time_ns(),
            runtime={k: v for k, v in record.runtime.items() if k != "spare"},
        )  # fmt: skip
        try:
            journal.hand_over_box(record)
        except JournalError:
            self._node.begin_end(box.id, GoneCause.KILLED)
            raise
        box.become(record, spec)
        self._untold.discard(box.id)

    async def _make(self, kind: str, spec: MachineSpec) -> None:
        """Make one, and let it run a command."""
        fields = spec.model_dump(mode="json", by_alias=True, exclude=_OF_THE_CALLER)
        request = CreateRequest(
            spec=fields | {"idle_s": _IDLE_S}, request_id=f"spare/{uuid.uuid4().hex}"
        )
        try:
            box = await self._node.make_spare(request)
        except HadalError as error:
            _LOG.warning("no spare machine: %s", error)
            return
        self._untold.add(box.id)
        try:
            await _warm(box)
        except HadalError as error:
            _LOG.warning("a spare machine does not answer: %s", error, extra={"sandbox_id": box.id})
            await self._node.end(box.id, GoneCause.KILLED)
        else:
            self._ready[kind].append(box.id)


async def _warm(box: Box) -> None:
    """Run the guest program itself, which every machine has, as a command."""
    order = CommandOrder(arguments=[b"/proc/self/exe", b"version"])
    output = Unread()
    output.command = box.guest.execute(box.next_guest_id(), order, output)
    await output.command.ended
    output.command.forget()


def _kind(spec: MachineSpec) -> str:
    fields = spec.model_dump(mode="json", by_alias=True, exclude=_OF_THE_CALLER)
    return json.dumps(fields, sort_keys=True)

"""Forks: boxes that begin with the files of another, and machines with all that runs in another."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, cast

from hadal.errors import GoneCause, HadalError
from hadal.node.box import Box
from hadal.node.steps import begin_step, recorded_step
from hadal.sandbox.specs import Capability

if TYPE_CHECKING:
    from hadal.node.node import Node

__all__ = ["Forks"]

_Make = Callable[[str], Awaitable[Box]]


class Forks:
    """Makes them.

    Args:
        node: Whose boxes.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node

    async def make(self, box_id: str, count: int, request_id: str) -> list[Box]:
        """Make boxes that begin with what one has: as it is now, while nothing in it runs.

        Raises:
            NodeError: The copy cannot be made.
            LaunchError, NoCapacityError: One of them could not be made; then none is.
        """
        box = self._node.get(box_id)
        box.require(Capability.FORK)
        journal = self._node.journal
        record = recorded_step(journal, box, request_id, repeatable=True)
        if record is not None and record.event.state == "done":
            return [self._node.get(child) for child in _children(record.event.result)]
        box.touch()
        made: list[Box] = []
        with begin_step(
            journal, box, "fork", {"count": count}, request_id=request_id, record=record
        ) as step:
            step.stays_begun = True
            async with self._copied(box, request_id) as make:
                step.stays_begun = False
                try:
                    for number in range(count):
                        child = await make(f"{request_id}/{number}")
                        made.append(child)
                except HadalError:
                    ending = (self._node.end(child.id, GoneCause.KILLED) for child in made)
                    await asyncio.gather(*ending)
                    await self._node.sweep_fork_layers()
                    raise
            step.result = {"boxes": [child.id for child in made]}
        return made

    @contextlib.asynccontextmanager
    async def _copied(self, box: Box, request_id: str) -> AsyncGenerator[_Make]:
        """Copy what a box has, and yield what makes another of it, given the id of the request for that."""
        node = self._node
        if box.machine is None:
            layer = await node.fork_layers.copy(box, request_id)
            yield lambda name: node.make_like(box, name, layer)
            return
        await box.awake()
        async with node.machines.copied(
            box.machine, box.guest, box.cgroup, box.pid, box.spec.memory_mb
        ) as snapshot:
            yield lambda name: node.make_like(box, name, snapshot=snapshot)

    async def undo(self, box_id: str) -> None:
        """After a restart: the boxes of a fork that was not completed end, since nobody was told of them.

        The fork stays begun: the same request does it again.
        """
        for record in self._node.journal.begun(box_id):
            if record.event.kind != "fork":
                continue
            for number in range(int(str(record.event.request["count"]))):
                child = self._node.journal.box_of_request(f"{record.request_id}/{number}")
                if child is not None:
                    await self._node.end(child.id, GoneCause.KILLED)
                    self._node.journal.forget_box(child.id)


def _children(result: Mapping[str, object] | None) -> list[str]:
    boxes = (result or {}).get("boxes")
    return [str(box) for box in cast(list[object], boxes)] if isinstance(boxes, list) else []

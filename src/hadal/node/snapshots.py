"""Images from boxes: what one has changed becomes a layer of the store."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

from hadal.node.box import Box
from hadal.node.images import ResolvedImage
from hadal.node.images.unpack import unpack
from hadal.node.machines.changes import packed_changes
from hadal.node.steps import begin_step, recorded_step
from hadal.node.tree_removal import remove_tree
from hadal.sandbox.specs import Capability

if TYPE_CHECKING:
    from hadal.node.node import Node

__all__ = ["Snapshots"]


class Snapshots:
    """Takes them.

    Args:
        node: Whose boxes.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node

    async def take(self, box: Box, name: str | None, request_id: str) -> str:
        """Make an image of what a box is now and return its name; nothing in the box runs meanwhile.

        Raises:
            UnsupportedError: This kind of box has no files of its own.
            ImageError: It cannot be stored.
        """
        box.require(Capability.SNAPSHOT_DISK)
        journal = self._node.journal
        record = recorded_step(journal, box, request_id, repeatable=True)
        if record is not None and record.event.state == "done":
            return str((record.event.result or {})["reference"])
        box.touch()
        request = {} if name is None else {"name": name}
        with begin_step(
            journal, box, "snapshot", request, request_id=request_id, record=record
        ) as step:
            reference = await self._commit(box, name)
            step.result = {"reference": reference}
        return reference

    async def _commit(self, box: Box, name: str | None) -> str:
        """Commit the copies that a forked box stands on, the lowest first, and then its own changes."""
        store = self._node.images
        base, copies = self._node.base_of(box)
        held: list[ResolvedImage] = []
        try:
            for copy in reversed(copies):
                made = await store.commit(self._node.fork_layers.path(copy), base)
                base = await store.acquire(made.digest)
                held.append(base)
            async with self._still_upper(box) as upper:
                made = await store.commit(upper, base, name=name)
        finally:
            for image in held:
                await store.release(image)
        return made.name

    @contextlib.asynccontextmanager
    async def _still_upper(self, box: Box) -> AsyncGenerator[Path]:
        """Yield the upper directory of a box in which nothing runs, or what is the same of a machine."""
        if box.machine is None:
            with self._node.disks.open(box.disk) as disk:
                async with box.held_still():
                    yield disk / "upper"
            return
        async with box.machine.held(box.guest), packed_changes(box) as archive:
            upper = archive.with_suffix(".upper")
            upper.mkdir()
            try:
                await asyncio.to_thread(unpack, archive, upper, bytes_max=archive.stat().st_size)
                yield upper
            finally:
                await asyncio.to_thread(remove_tree, upper)

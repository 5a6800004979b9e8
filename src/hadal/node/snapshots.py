"""What is kept of boxes: an image of files, what one has changed being a layer of the store; or a whole machine."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

from hadal.node.box import Box
from hadal.node.images import ResolvedImage
from hadal.node.images.unpack import unpack
from hadal.node.machines.changes import packed_changes
from hadal.node.machines.disk_images import is_disk_image
from hadal.node.steps import begin_step, recorded_step
from hadal.node.tree_removal import remove_tree
from hadal.sandbox.protocol import SnapshotKind
from hadal.sandbox.specs import Capability, MachineSpec

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

    async def take(
        self, box: Box, name: str | None, request_id: str, *, kind: SnapshotKind = "files"
    ) -> str:
        """Keep what a box is now and return its reference; nothing in the box runs meanwhile.

        Args:
            box: Which.
            name: For it. Default: one is made up.
            request_id: Twice the same makes one.
            kind: An image of its files, or all of a machine.

        Raises:
            UnsupportedError: This kind of box has nothing of that kind.
            ImageError: It cannot be stored.
            NodeError: A machine does not stand still, or the disk is full.
        """
        box.require(Capability.SNAPSHOT_DISK if kind == "files" else Capability.SNAPSHOT_FULL)
        journal = self._node.journal
        record = recorded_step(journal, box, request_id, repeatable=True)
        if record is not None and record.event.state == "done":
            return str((record.event.result or {})["reference"])
        box.touch()
        request = {} if name is None else {"name": name}
        request |= {} if kind == "files" else {"kind": kind}
        with begin_step(
            journal, box, "snapshot", request, request_id=request_id, record=record
        ) as step:
            if kind == "full":
                reference = await self._keep(box, name)
            elif is_disk_image(self._node.base_of(box)[0].name):
                assert box.machine is not None
                assert isinstance(box.spec, MachineSpec)
                if Capability.COMMANDS in box.spec.can:
                    await box.applet("sync")
                await box.awake()
                reference = await self._node.machines.keep_disk(
                    box.machine, box.guest, box.spec, name
                )
            else:
                reference = await self._commit(box, name)
            step.result = {"reference": reference}
        return reference

    async def _keep(self, box: Box, name: str | None) -> str:
        """Keep a machine."""
        node, machines = self._node, self._node.machines
        assert box.machine is not None
        assert isinstance(box.spec, MachineSpec)
        root = node.base_of(box)[0]
        about = await asyncio.to_thread(machines.about, box.spec, root, node.config.lease_s)
        await box.awake()
        async with machines.copied(
            box.machine, box.guest, box.cgroup, box.pid, box.spec.memory_mb
        ) as snapshot:
            return await asyncio.to_thread(machines.kept.keep, name, snapshot, about)

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
        await box.awake()
        async with box.machine.held(box.guest), packed_changes(box) as archive:
            upper = archive.with_suffix(".upper")
            upper.mkdir()
            try:
                await asyncio.to_thread(unpack, archive, upper, bytes_max=archive.stat().st_size)
                yield upper
            finally:
                await asyncio.to_thread(remove_tree, upper)

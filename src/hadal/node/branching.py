"""Boxes from boxes: what one has changed becomes a layer under others.

The changes of a box lie in one directory, its overlay's upper one. A fork copies it, while the box stands
still, and starts others above the copy; they share it, and it is removed with the last of them.
"""

import asyncio
import errno
import hashlib
import os
from pathlib import Path

from hadal.errors import NodeError
from hadal.node.box import Box
from hadal.node.scratch import Disks
from hadal.node.tree_copy import copy_tree
from hadal.node.tree_removal import remove_tree

__all__ = ["ForkLayers"]

_SMALL_ENTRIES = 64
_SMALL_BYTES = 1 << 20
"""Trees up to this size are copied at once; a thread costs more."""


def _is_small(folder: Path) -> bool:
    size = 0
    for entries, path in enumerate(folder.rglob("*")):
        size += path.lstat().st_size
        if entries > _SMALL_ENTRIES or size > _SMALL_BYTES:
            return False
    return True


def _failure(box_id: str, error: OSError | RecursionError) -> NodeError:
    number = None if isinstance(error, RecursionError) else error.errno
    hint = None
    if number is None or number == errno.ENAMETOOLONG:
        reason = "its directories are nested too deep"
        hint = "remove them in the box: some hundred levels can be copied"
    else:
        reason = os.strerror(number) if number else str(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            hint = "free space on the node's disk"
    return NodeError(f"cannot copy the changes of box {box_id}: {reason}", hint=hint)


class ForkLayers:
    """The copies of this node.

    Args:
        folder: Where they lie.
        disks: Of the boxes.
    """

    def __init__(self, folder: Path, disks: Disks) -> None:
        self._folder = folder
        self._disks = disks
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return where a copy lies."""
        return self._folder / name

    async def copy(self, box: Box, request_id: str) -> str:
        """Copy what a box has changed and return the name of the copy.

        Raises:
            NodeError: The disk is full, or fails, or the box has nested directories too deep.
        """
        name = hashlib.sha256(f"{box.id}/{request_id}".encode()).hexdigest()[:16]
        part = self.path(f"{name}.part")
        try:
            if part.exists():
                await asyncio.to_thread(remove_tree, part)
            with self._disks.open(box.disk) as disk:
                upper = disk / "upper"
                async with box.held_still():
                    if _is_small(upper):
                        copy_tree(upper, part)
                    else:
                        await asyncio.to_thread(copy_tree, upper, part)
            if not self.path(name).exists():
                part.rename(self.path(name))
        except (OSError, RecursionError) as error:
            await asyncio.to_thread(remove_tree, part)
            raise _failure(box.id, error) from error
        return name

    async def sweep(self, used: set[str]) -> None:
        """Remove the copies that no box stands on."""
        for path in list(self._folder.iterdir()):
            if path.name not in used:
                await asyncio.to_thread(remove_tree, path)

"""Places for boxes: each has its own ids of users on the host, and its share of what all may use."""

from collections import deque

from hadal.errors import NoCapacityError
from hadal.node.cgroups import BoxLimits
from hadal.node.machines.qemu import MEMORY_OF_QEMU_MB
from hadal.sandbox.specs import MachineSpec, Spec

__all__ = ["Slots", "limits_of", "memory_mb"]


def memory_mb(spec: Spec) -> int:
    """Return how much memory a box may use, with what runs it."""
    return spec.memory_mb + (MEMORY_OF_QEMU_MB if isinstance(spec, MachineSpec) else 0)


def limits_of(spec: Spec) -> BoxLimits:
    """Return what the groups of a box let it use."""
    return BoxLimits(memory_bytes=memory_mb(spec) << 20, cpus=spec.cpus, pids=spec.pids)


class Slots:
    """The places of a node; one that was given back comes last.

    Args:
        count: How many there are.
        memory_mb: MiB that all boxes may use together, each counted with its limit; None for any.

    Attributes:
        memory_mb: As the argument.
    """

    def __init__(self, count: int, memory_mb: int | None = None) -> None:
        self.memory_mb = memory_mb
        self._count = count
        self._taken: dict[str, tuple[int, int]] = {}
        self._free = deque(range(count))
        self._used_mb = 0

    def __len__(self) -> int:
        """Return how many are taken."""
        return len(self._taken)

    @property
    def used_mb(self) -> int:
        """MiB that those of all boxes may use."""
        return self._used_mb

    def take(self, box_id: str, memory_mb: int) -> int:
        """Take one for a box that may use so much memory.

        Raises:
            NoCapacityError: There is none, or too little memory.
        """
        if len(self._taken) >= self._count:
            raise NoCapacityError(
                f"the node has {len(self._taken)} boxes, as many as it may",
                hint="end some, wait, or raise max_boxes",
            )
        self._see_that_there_is(memory_mb)
        slot = self._free.popleft()
        self._note(box_id, slot, memory_mb)
        return slot

    def _see_that_there_is(self, memory_mb: int) -> None:
        if self.memory_mb is not None and self._used_mb + memory_mb > self.memory_mb:
            raise NoCapacityError(
                f"the boxes of the node may use {self._used_mb} of {self.memory_mb} MiB, and this one would"
                f" {memory_mb} more",
                hint="end some, wait, ask for less memory, or let the node overcommit more",
            )

    def adopt(self, box_id: str, slot: int, memory_mb: int) -> None:
        """Note which one a box has that another daemon made, perhaps one that had more of them."""
        self._note(box_id, slot, memory_mb)
        if slot in self._free:
            self._free.remove(slot)

    def _note(self, box_id: str, slot: int, memory_mb: int) -> None:
        self._taken[box_id] = slot, memory_mb
        self._used_mb += memory_mb

    def rest(self, box_id: str) -> None:
        """Let others have the memory of a box, which keeps its place."""
        slot, memory_mb = self._taken[box_id]
        self._taken[box_id] = slot, 0
        self._used_mb -= memory_mb

    def rise(self, box_id: str, memory_mb: int) -> None:
        """Count the memory of a box again.

        Raises:
            NoCapacityError: There is too little.
        """
        slot, had_mb = self._taken[box_id]
        self._see_that_there_is(memory_mb - had_mb)
        self._taken[box_id] = slot, memory_mb
        self._used_mb += memory_mb - had_mb

    def give_back(self, box_id: str) -> None:
        """Give back that of a box, if it has one."""
        taken = self._taken.pop(box_id, None)
        if taken is not None:
            self._free.append(taken[0])
            self._used_mb -= taken[1]

"""Places for boxes: each has its own ids of users on the host."""

from collections import deque

__all__ = ["Slots"]


class Slots:
    """The places of a node; one that was given back comes last.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self._taken: dict[str, int] = {}
        self._free = deque(range(count))

    def __len__(self) -> int:
        """Return how many are taken."""
        return len(self._taken)

    def take(self, box_id: str) -> int:
        """Take one for a box; there has to be one."""
        slot = self._taken[box_id] = self._free.popleft()
        return slot

    def adopt(self, box_id: str, slot: int) -> None:
        """Note which one a box has that another daemon made, perhaps one that had more of them."""
        self._taken[box_id] = slot
        if slot in self._free:
            self._free.remove(slot)

    def give_back(self, box_id: str) -> None:
        """Give back that of a box, if it has one."""
        slot = self._taken.pop(box_id, None)
        if slot is not None:
            self._free.append(slot)

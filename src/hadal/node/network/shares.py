"""Places that boxes share: those who have many cannot keep out those who have few."""

__all__ = ["Shares"]

_PART = 8


class Shares:
    """Counts places. Nobody gets more than a part of what is free, so that something always is.

    Args:
        places: All of them.
        each: That one box may have, while there is room.
    """

    def __init__(self, places: int, each: int) -> None:
        self._free = places
        self._each = each

    def take(self, held: int) -> bool:
        """Take a place for who has so many already; False where it must do without.

        With n boxes that want all they can get, each has about places / (n + 8), and as much is free.
        """
        if held >= min(self._each, -(-self._free // _PART)) or not self._free:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """Give one back."""
        self._free += 1

"""Rows that are written once, one behind the other: what has been handed out of them never changes.

So a layer takes up a token without copying what it has, and a snapshot is still a reference.
"""

import torch
from torch import Tensor

from hadal.model.compressor import Tail

__all__ = ["MORE_KEYS", "TailTape", "Tape"]

MORE_KEYS = 128
"""Room of a window for the keys of tokens to come; then it is copied, so that its memory does not grow."""


class Tape:
    """Rows, and room for more.

    Args:
        rows: [n, K] that are there already; they are copied.
        room: How many more there can be.

    Attributes:
        count: How many there are.
    """

    def __init__(self, rows: Tensor, room: int) -> None:
        self.count = rows.shape[0]
        self._most = self.count + room
        self._rows = torch.empty((self._most, rows.shape[1]), dtype=rows.dtype)
        self._rows[: self.count] = rows
        self._row_bytes = rows.shape[1] * rows.element_size()

    @property
    def is_full(self) -> bool:
        """Return whether there is no room for another."""
        return self.count == self._most

    def push(self) -> int:
        """Return the address of one more row, which the caller writes now."""
        self.count += 1
        return self.address(1)

    def address(self, count: int) -> int:
        """Return where the last so many rows begin."""
        return self._rows.data_ptr() + (self.count - count) * self._row_bytes

    def last(self, count: int) -> Tensor:
        """Return the last rows, at most so many, as a view."""
        return self._rows[max(self.count - count, 0) : self.count]


class TailTape:
    """The unfinished window of a compressor.

    Args:
        tail: As it is; it has to be one of inference.

    Attributes:
        tail: As it is now.
    """

    def __init__(self, tail: Tail) -> None:
        self.tail = tail
        room = tail.rate - tail.kv.shape[0]
        self._kv, self._gate = Tape(tail.kv, room), Tape(tail.gate, room)

    def push(self) -> tuple[int, int]:
        """Return the addresses of keys and logits of one more token, which the caller writes now.

        If its window is full then, it is not in `tail` but `full_row`.
        """
        addresses = self._kv.push(), self._gate.push()
        if not self._kv.is_full:
            tail, count = self.tail, self._kv.count
            rows = self._kv.last(count), self._gate.last(count)
            self.tail = Tail(tail.rate, *rows, tail.previous_kv, tail.previous_gate)
        return addresses

    def full_row(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and logits of the token that made the window full; None where it is not."""
        return (self._kv.last(1), self._gate.last(1)) if self._kv.is_full else None

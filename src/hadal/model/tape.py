"""What sequences leave behind while they take one token at a time, where the library writes it.

A tape has room up to the next multiple of 128 tokens, in all layers: keys of the window are written once, one behind the other,
and what compressors made of the last tokens lies in rings. So a step copies nothing and makes nothing; what a cache has of its
layers is read off the tape when somebody asks.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hadal.model.compressor import Tail
from hadal.model.kernels.attention import Pages
from hadal.model.kernels.decode import SPAN_TOKENS, store_numbers
from hadal.model.rope import Rotation

__all__ = ["LayerState", "Ring", "SequenceTape"]


@runtime_checkable
class Counted(Protocol):
    """Rows of which the library writes more."""

    def pages(self) -> Pages | None:
        """Return where the rows lie; the same object while they lie there."""
        ...

    def extend_to(self, count: int) -> None:
        """Count rows that have been written where they lie."""
        ...


@runtime_checkable
class LayerState(Protocol):
    """Of a layer, what a tape begins with and what is read off it: `cache.LayerCache`."""

    window: Tensor
    window_size: int
    tail: Tail | None
    index_tail: Tail | None

    @property
    def entries(self) -> Counted:
        """Return its compressed entries."""
        ...

    @property
    def index_keys(self) -> Counted:
        """Return the indexer's keys of them."""
        ...


class Ring:
    """Rows of a compressor's last tokens: those of a window, or of two where windows overlap.

    Args:
        tail: As it is.
        position: Of the token that comes next.
    """

    def __init__(self, tail: Tail, position: int) -> None:
        self._tail = tail
        self._rate = tail.rate
        self._rows = 2 * tail.rate if tail.overlap else tail.rate
        shape = (self._rows, tail.kv.shape[1])
        self._kv, self._gate = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
        own, before = self._places(position)
        self._kv[own], self._gate[own] = tail.kv, tail.gate
        if tail.overlap:
            width = tail.previous_kv.shape[1]
            self._kv[before, :width] = tail.previous_kv
            self._gate[before, :width] = tail.previous_gate

    def _places(self, position: int) -> tuple[slice, slice]:
        """Return where the unfinished window lies, and the one before it."""
        count = position % self._rate
        begin = (position - count) % self._rows
        before = (begin + self._rate) % self._rows
        return slice(begin, begin + count), slice(before, before + self._rate)

    def tail_at(self, position: int) -> Tail:
        """Return the tail before a token, on memory of its own."""
        own, before = self._places(position)
        previous = self._tail.previous_kv, self._tail.previous_gate
        if self._tail.overlap:
            width = previous[0].shape[1]
            previous = self._kv[before, :width].clone(), self._gate[before, :width].clone()
        return Tail(self._rate, self._kv[own].clone(), self._gate[own].clone(), *previous)

    def addresses(self) -> tuple[int, int]:
        """Return where keys and logits lie."""
        return self._kv.data_ptr(), self._gate.data_ptr()


class _LayerTape:
    """One layer's part of a tape."""

    def __init__(self, layer: LayerState, position: int, pages: Sequence[Pages | None]) -> None:
        self.before = layer.window.shape[0]
        room = SPAN_TOKENS - position % SPAN_TOKENS
        self._window_size = layer.window_size
        self.keys = layer.window.new_empty((self.before + room, layer.window.shape[1]))
        self.keys[: self.before] = layer.window
        self.rings = [tail and Ring(tail, position) for tail in (layer.tail, layer.index_tail)]
        self.pages = pages

    def numbers(self) -> list[int]:
        """Return it as the enum `tape_number` of native/decode.h has it."""
        found = [self.keys.data_ptr(), self.before]
        for ring in self.rings:
            found += (0, 0) if ring is None else ring.addresses()
        for pages in self.pages:
            found += store_numbers(pages)
        return found

    def window(self, taken: int) -> Tensor:
        """Return the keys that the next token sees, as a view: nobody writes to them any more."""
        end = self.before + taken
        return self.keys[max(end - self._window_size + 1, 0) : end]


class SequenceTape:
    """A sequence while it takes one token at a time.

    Args:
        owner: Whose layers they are.
        layers: As they are.
        position: Of the token that comes next.
        rotations: Of `SPAN_TOKENS` tokens from the last multiple of that on, in layers without and with compression.
        pages: Of each layer's entries and index keys; None for what it does not have. With room up to the end of the tape.

    Attributes:
        position: Of the token that comes next.
        settled: Whether the layers are what the tape says.
    """

    def __init__(
        self, owner: object, layers: Sequence[LayerState], position: int,
        rotations: tuple[Rotation, Rotation], pages: Sequence[Sequence[Pages | None]],
    ) -> None:  # fmt: skip
        self.owner = owner
        self.position = self._first = position
        self.settled = True
        self._rotations = rotations
        self._tapes = [
            _LayerTape(layer, position, own) for layer, own in zip(layers, pages, strict=True)
        ]
        self._numbers = torch.tensor([tape.numbers() for tape in self._tapes], dtype=torch.int64)
        self._places = [t.data_ptr() for rotation in rotations for t in rotation]
        self._read = [_parts(layer) for layer in layers]
        self._stores = [
            (store, found)
            for layer, own in zip(layers, pages, strict=True)
            for store, found in zip((layer.entries, layer.index_keys), own, strict=True)
            if found is not None
        ]

    def numbers(self) -> list[int]:
        """Return it as the enum `sequence_number` of native/decode.h has it."""
        return [self._numbers.data_ptr(), self._first, self.position, *self._places]

    def goes_on(self, owner: object, layers: Sequence[LayerState], position: int) -> bool:
        """Return whether it has room for a token at a position, and nobody has moved what it rests on."""
        if self.owner is not owner or self.position != position:
            return False
        if position > self._first and position % SPAN_TOKENS == 0:
            return False
        if self.settled and not all(
            now is then
            for layer, read in zip(layers, self._read, strict=True)
            for now, then in zip(_parts(layer), read, strict=True)
        ):
            return False
        return all(store.pages() is pages for store, pages in self._stores)

    def advance(self) -> None:
        """Take up the token that the library has written."""
        self.position += 1
        self.settled = False

    def settle(self, layers: Sequence[LayerState]) -> None:
        """Make the layers what the tape says."""
        for layer, tape in zip(layers, self._tapes, strict=True):
            layer.window = tape.window(self.position - self._first)
            for name, ring, store in zip(
                ("tail", "index_tail"), tape.rings, (layer.entries, layer.index_keys), strict=True
            ):
                if ring is not None:
                    tail = ring.tail_at(self.position)
                    setattr(layer, name, tail)
                    store.extend_to(self.position // tail.rate)
        self._read = [_parts(layer) for layer in layers]
        self.settled = True


def _parts(layer: LayerState) -> tuple[object, ...]:
    return layer.window, layer.tail, layer.index_tail

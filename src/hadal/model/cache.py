"""What one sequence leaves behind for its next tokens (report 3.5; spec/model.md 5).

Per layer the last window of keys, the compressors' tails, and the entries so far. Windows and tails
are replaced, never written in place, and entries only grow; so a snapshot is a handful of references
and restoring it is exact (spec T8). Entries are kept by an `EntryStore`: here one growing buffer, in
`hadal.engine` blocks that sequences share.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.errors import InputError
from hadal.model.compressor import Tail
from hadal.model.kernels.attention import Pages
from hadal.model.tape import SequenceTape

__all__ = [
    "Entries",
    "EntryStore",
    "LayerCache",
    "SequenceCache",
    "Slot",
    "Snapshot",
    "Step",
    "last_rows",
]

_FIRST_PAGE = torch.zeros(1, dtype=torch.int64)
_SERIALS = itertools.count()
"""Unique in the process, so that no cache takes another's snapshot for its own."""


@runtime_checkable
class EntryStore(Protocol):
    """Compressed entries, or index keys, of one sequence in one layer."""

    def __len__(self) -> int: ...

    def append(self, rows: Float[Tensor, "C K"]) -> None:
        """Add rows at the end."""
        ...

    def rows(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "C K"]:
        """Return consecutive rows, which the caller must not write to."""
        ...

    def gather(self, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape K"]:
        """Return rows by number."""
        ...

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        ...

    def num_bytes(self) -> int:
        """Return the bytes that the rows occupy, spare room left out."""
        ...

    def pages(self) -> Pages | None:
        """Return where the rows lie, the same object while they lie there; None if in no form that kernels read."""
        ...

    def with_room(self, count: int, width: int, dtype: torch.dtype) -> Pages | None:
        """Return `pages`, where the next rows may be written as well; None where they may not.

        Args:
            count: Of the rows that are written.
            width: Theirs.
            dtype: Of what `append` would be given.
        """
        ...

    def extend_to(self, count: int) -> None:
        """Count rows that have been written in place."""
        ...


class Entries:
    """Rows that only grow, in a buffer that doubles.

    The first rows appended are kept as they are, without a copy, so that a whole sequence in one
    call stays differentiable.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._count = 0
        self._seen: tuple[Tensor, Pages] | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Float[Tensor, "C K"]) -> None:
        """Add rows at the end."""
        if rows.shape[0] == 0 and self._buffer is not None:
            return
        if self._count == 0:
            self._buffer = rows
        else:
            self._reserve(self._count + rows.shape[0])
            assert self._buffer is not None
            self._buffer[self._count : self._count + rows.shape[0]] = rows
        self._count += rows.shape[0]

    def rows(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "C K"]:
        """Return consecutive rows, as a view."""
        assert self._buffer is not None
        return self._buffer[start : self._count if stop is None else min(stop, self._count)]

    def gather(self, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape K"]:
        """Return rows by number."""
        return self.rows()[index]

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        assert count <= self._count
        self._count = count

    def num_bytes(self) -> int:
        """Return the bytes that the rows occupy, spare room left out."""
        return 0 if self._buffer is None else _num_bytes(self.rows())

    def pages(self) -> Pages | None:
        """Return where the rows lie: on one page."""
        packing = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
        if self._buffer is None or self._buffer.dtype not in packing:
            return None
        if self._seen is None or self._seen[0] is not self._buffer:
            page = self._buffer.unsqueeze(0)
            self._seen = self._buffer, Pages(page, _FIRST_PAGE, packing[page.dtype])
        return self._seen[1]

    def with_room(self, count: int, width: int, dtype: torch.dtype) -> Pages | None:
        """Return where the rows lie, with room for more."""
        if self._buffer is None:
            self._buffer = torch.empty(0, width, dtype=dtype)
        self._reserve(self._count + count)
        return self.pages()

    def extend_to(self, count: int) -> None:
        """Count rows that have been written in place."""
        self._count = count

    def _reserve(self, count: int) -> None:
        assert self._buffer is not None
        # Outside of inference mode its tensors cannot be written to, only copied.
        frozen = self._buffer.is_inference() and not torch.is_inference_mode_enabled()
        if count <= self._buffer.shape[0] and not frozen:
            return
        grown = self._buffer.new_empty(max(count, 2 * self._count), self._buffer.shape[1])
        grown[: self._count] = self._buffer[: self._count]
        self._buffer = grown


@dataclass(frozen=True)
class Slot:
    """The part of a layer's state that does not grow. Its tensors are never written to."""

    window: Tensor
    """[<= window - 1, K] rotated keys of the last tokens, oldest first."""
    tail: Tail | None
    index_tail: Tail | None

    def tensors(self) -> list[Tensor]:
        """Return all tensors in a fixed order."""
        tensors = [self.window]
        for tail in (self.tail, self.index_tail):
            if tail is not None:
                tensors += [tail.kv, tail.gate, tail.previous_kv, tail.previous_gate]
        return tensors

    def owned(self) -> "Slot":
        """Return it on memory of its own, and no more than it needs."""
        return self.filled(iter([tensor.clone() for tensor in self.tensors()]))

    def filled(self, tensors: Iterator[Tensor]) -> "Slot":
        """Return a slot of the same kind with other tensors, taken in the order of `tensors`."""
        window = next(tensors)
        tails = [
            tail and Tail(tail.rate, next(tensors), next(tensors), next(tensors), next(tensors))
            for tail in (self.tail, self.index_tail)
        ]
        return Slot(window, *tails)


@dataclass(frozen=True)
class Step:
    """What one call added to a layer, token by token, so that a part of it can be kept."""

    before: Slot
    window: Tensor
    compressed: tuple[Tensor, Tensor] | None
    index_compressed: tuple[Tensor, Tensor] | None


@dataclass
class LayerCache:
    """State of one layer; the compressed parts are None where the layer has none."""

    window: Tensor
    """[<= window - 1, K] rotated keys of the last tokens, oldest first."""
    window_size: int
    tail: Tail | None = None
    index_tail: Tail | None = None
    entries: EntryStore = field(default_factory=Entries)
    index_keys: EntryStore = field(default_factory=Entries)
    step: Step | None = None
    """Of the last call, if `SequenceCache.rewindable`."""

    @property
    def slot(self) -> Slot:
        """Return the part that does not grow."""
        return Slot(self.window, self.tail, self.index_tail)

    @slot.setter
    def slot(self, slot: Slot) -> None:
        self.window, self.tail, self.index_tail = slot.window, slot.tail, slot.index_tail
        self.step = None

    def extend_window(self, rows: Float[Tensor, "T K"]) -> Float[Tensor, "P K"]:
        """Add the keys of new tokens; return the old and the new together."""
        window_PK = torch.cat((self.window, rows))
        self.window = last_rows(window_PK, self.window_size - 1)
        return window_PK

    def slot_after(self, kept: int) -> Slot:
        """Return the slot as it was after this many tokens of the last call."""
        assert self.step is not None
        before, step = self.step.before, self.step
        window_PK = torch.cat((before.window, step.window[:kept]))
        return Slot(
            last_rows(window_PK, self.window_size - 1),
            _advance(before.tail, step.compressed, kept),
            _advance(before.index_tail, step.index_compressed, kept),
        )

    def rewind(self, start: int, kept: int) -> None:
        """Return to `kept` tokens after position `start`, where the last call began."""
        self.slot = self.slot_after(kept)
        for tail, store in ((self.tail, self.entries), (self.index_tail, self.index_keys)):
            if tail is not None:
                store.truncate((start + kept) // tail.rate)


@dataclass(frozen=True)
class Snapshot:
    """A point of a sequence that `SequenceCache.restore` returns to."""

    num_tokens: int
    layers: tuple[tuple[Slot, int, int], ...]
    serial: int


@dataclass
class SequenceCache:
    """State of one sequence in all layers of a stack (the main one, or one MTP block).

    Attributes:
        kept: State of each layer, as it was when somebody last asked for `layers`.
        num_tokens: Tokens seen so far.
        rewindable: Keep what `rewind` needs of each call; costs memory in proportion to the call.
        call_start: Where the last call began.
        tape: Where the library writes what single tokens leave behind; None before the first of them.
    """

    kept: list[LayerCache]
    num_tokens: int = 0
    rewindable: bool = False
    call_start: int = 0
    tape: SequenceTape | None = None
    _live: list[int] = field(default_factory=list[int])

    @property
    def layers(self) -> list[LayerCache]:
        """Return the state of each layer."""
        if self.tape is not None and not self.tape.settled:
            self.tape.settle(self.kept)
            self.forget_call()
        return self.kept

    def __getstate__(self) -> Mapping[str, object]:
        """Return what a copy is made of: it makes a tape of its own."""
        return self.__dict__ | {"kept": self.layers, "tape": None}

    def is_taken_by(self, block: object) -> bool:
        """Return whether its last token has gone through the run of blocks that begins with this one, in one call."""
        return self.tape is not None and not self.tape.settled and self.tape.owner is block

    def advance(self, count: int) -> None:
        """Count the tokens of a call that has succeeded."""
        self.call_start = self.num_tokens
        self.num_tokens += count

    def forget_call(self) -> None:
        """Let go of what `rewind` would need."""
        for layer in self.kept:
            layer.step = None

    def snapshot(self) -> Snapshot:
        """Remember the present point. Costs no copy of any tensor."""
        serial = next(_SERIALS)
        self._live.append(serial)
        layers = tuple((c.slot, len(c.entries), len(c.index_keys)) for c in self.layers)
        return Snapshot(self.num_tokens, layers, serial)

    def discard(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that will not be restored."""
        if snapshot.serial in self._live:
            self._live.remove(snapshot.serial)

    def restore(self, snapshot: Snapshot) -> None:
        """Return, bit for bit, to an earlier point of this sequence.

        Raises:
            InputError: The point is not in this sequence's past: the snapshot is another cache's,
                or was taken after a point that has since been restored.
        """
        if snapshot.serial not in self._live:
            raise InputError(
                f"cannot restore a snapshot at token {snapshot.num_tokens}: it does not lie in "
                f"the past of this cache, which holds {self.num_tokens} tokens",
                hint="a snapshot is void once an earlier one has been restored",
            )
        self._live = [s for s in self._live if s <= snapshot.serial]
        for cache, (slot, num_entries, num_keys) in zip(self.layers, snapshot.layers, strict=True):
            cache.slot = slot
            cache.entries.truncate(num_entries)
            cache.index_keys.truncate(num_keys)
        self.num_tokens = snapshot.num_tokens

    def rewind(self, num_tokens: int) -> None:
        """Keep only the first tokens of the last call, as if the rest had never been given.

        Bit for bit the state of a call that ended there; costs no pass through the model.

        Raises:
            InputError: The point is not within the last call, or the cache was not `rewindable`.
        """
        if num_tokens == self.num_tokens:
            return
        self._check_within_call(num_tokens)
        for cache in self.layers:
            cache.rewind(self.call_start, num_tokens - self.call_start)
        self.num_tokens = num_tokens

    def slots(self, num_tokens: int | None = None) -> tuple[Slot, ...]:
        """Return windows and tails as they are, or were at an earlier point of the last call.

        Raises:
            InputError: As `rewind`.
        """
        if num_tokens is None or num_tokens == self.num_tokens:
            return tuple(c.slot.owned() for c in self.layers)
        self._check_within_call(num_tokens)
        return tuple(c.slot_after(num_tokens - self.call_start) for c in self.layers)

    def load_slots(self, slots: Sequence[Slot], num_tokens: int) -> None:
        """Continue from windows and tails that `slots` returned, of a sequence with this beginning.

        The entries are the caller's affair: each layer's store must hold those of `num_tokens` tokens.
        """
        for cache, slot in zip(self.layers, slots, strict=True):
            cache.slot = slot
        self.num_tokens = self.call_start = num_tokens
        self._live.clear()

    def _check_within_call(self, num_tokens: int) -> None:
        if not self.call_start <= num_tokens < self.num_tokens or self.layers[0].step is None:
            raise InputError(
                f"cannot rewind to token {num_tokens}: the last call took tokens "
                f"{self.call_start} to {self.num_tokens}",
                hint="set rewindable before the call; a call can be rewound once",
            )

    def num_bytes(self) -> int:
        """Return the bytes that the state occupies, spare room of growing buffers left out."""
        stores = sum(c.entries.num_bytes() + c.index_keys.num_bytes() for c in self.layers)
        return stores + self.slot_bytes()

    def slot_bytes(self) -> int:
        """Return the bytes of the part that does not grow: windows and tails."""
        return sum(_num_bytes(t) for c in self.layers for t in c.slot.tensors())


def _advance(tail: Tail | None, projected: tuple[Tensor, Tensor] | None, kept: int) -> Tail | None:
    if tail is None or projected is None:
        return tail
    kv, gate = projected
    return tail.advance(kv[:kept], gate[:kept])


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def last_rows(rows: Tensor, count: int) -> Tensor:
    """Return the last `count` rows on memory of their own, so that a large chunk is not kept."""
    kept = rows[max(rows.shape[0] - count, 0) :]
    return kept if torch.is_grad_enabled() else kept.clone()

"""What one sequence leaves behind for its next tokens (report 3.5; spec/model.md 5).

The reference cache: per layer the last window of keys, the compressors' tails, and the entries so
far. Tensors held here are replaced, never written in place, but for the spare room behind the entries,
which only grow; so a snapshot is a handful of references and restoring it is exact (spec T8).
"""

import itertools
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.errors import InputError
from hadal.model.compressor import Tail

__all__ = ["Entries", "LayerCache", "SequenceCache", "Snapshot", "last_rows"]

_SERIALS = itertools.count()
"""Unique in the process, so that no cache takes another's snapshot for its own."""


class Entries:
    """Rows that only grow, in a buffer that doubles.

    The first rows appended are kept as they are, without a copy, so that a whole sequence in one
    call stays differentiable.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._count = 0

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

    def rows(self) -> Float[Tensor, "C K"]:
        """Return all rows, as a view."""
        assert self._buffer is not None
        return self._buffer[: self._count]

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        assert count <= self._count
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


@dataclass
class LayerCache:
    """State of one layer; the compressed parts are None where the layer has none."""

    window: Tensor
    """[<= window - 1, K] rotated keys of the last tokens, oldest first."""
    tail: Tail | None = None
    index_tail: Tail | None = None
    entries: Entries = field(default_factory=Entries)
    index_keys: Entries = field(default_factory=Entries)


@dataclass(frozen=True)
class Snapshot:
    """A point of a sequence that `SequenceCache.restore` returns to."""

    num_tokens: int
    layers: tuple[tuple[LayerCache, int, int], ...]
    serial: int


@dataclass
class SequenceCache:
    """State of one sequence in all layers of a stack (the main one, or one MTP block)."""

    layers: list[LayerCache]
    num_tokens: int = 0
    _live: list[int] = field(default_factory=list[int])

    def snapshot(self) -> Snapshot:
        """Remember the present point. Costs no copy of any tensor."""
        serial = next(_SERIALS)
        self._live.append(serial)
        layers = tuple((replace(c), len(c.entries), len(c.index_keys)) for c in self.layers)
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
        for cache, (saved, num_entries, num_keys) in zip(self.layers, snapshot.layers, strict=True):
            cache.window, cache.tail, cache.index_tail = saved.window, saved.tail, saved.index_tail
            cache.entries.truncate(num_entries)
            cache.index_keys.truncate(num_keys)
        self.num_tokens = snapshot.num_tokens

    def num_bytes(self) -> int:
        """Return the bytes that the state occupies, spare room of growing buffers left out."""
        return sum(t.numel() * t.element_size() for c in self.layers for t in _tensors(c))


def _tensors(cache: LayerCache) -> list[Tensor]:
    tensors = [cache.window]
    for tail in (cache.tail, cache.index_tail):
        if tail is not None:
            tensors += [tail.kv, tail.gate, tail.previous_kv, tail.previous_gate]
    return tensors + [store.rows() for store in (cache.entries, cache.index_keys) if len(store)]


def last_rows(rows: Tensor, count: int) -> Tensor:
    """Return the last `count` rows on memory of their own, so that a large chunk is not kept."""
    kept = rows[max(rows.shape[0] - count, 0) :]
    return kept if torch.is_grad_enabled() else kept.clone()

"""What the blocks contain, and the view of it that one sequence has.

`BlockStorage` holds one tensor per layer and kind of entry, indexed by block. `SequenceBlocks` is one
sequence's list of blocks; `PagedEntries` shows it to a layer as the `EntryStore` that the model knows.
Sealed blocks are read, never written: a sequence that runs tokens again to bring its window back
passes over them.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.config import LayerKind
from hadal.engine.block_pool import BLOCK_TOKENS
from hadal.engine.storage_format import Codec, StorageFormat
from hadal.model import SequenceCache, Transformer
from hadal.model.kernels.attention import Pages

__all__ = ["BlockStorage", "PagedEntries", "SequenceBlocks"]

_RATES = {LayerKind.CSA: 4, LayerKind.HCA: 128}


@dataclass
class SequenceBlocks:
    """The blocks of one sequence, in order.

    Attributes:
        ids: Block numbers; those after `num_sealed` are the sequence's own.
        num_sealed: How many are full, named and not to be written.
    """

    device: torch.device
    ids: list[int] = field(default_factory=list[int])
    num_sealed: int = 0
    _table: Tensor | None = None

    @property
    def table(self) -> Int[Tensor, " N"]:
        """Return the block numbers as a tensor."""
        if self._table is None or self._table.shape[0] != len(self.ids):
            self._table = torch.tensor(self.ids, dtype=torch.int64, device=self.device)
        return self._table

    def replace(self, idx: int, block: int) -> None:
        """Put another block in a place."""
        self.ids[idx] = block
        self._table = None


class PagedEntries:
    """Entries of one sequence in one layer: an `EntryStore` over blocks."""

    def __init__(
        self,
        pages: Float[Tensor, "N P W"],
        codec: Codec,
        blocks: SequenceBlocks,
        dtype: torch.dtype,
        count: int,
    ) -> None:
        self._pages = pages
        self._codec = codec
        self._blocks = blocks
        self._dtype = dtype
        self._count = count
        self._per_block = pages.shape[1]
        plain = codec.packing == "plain"  # float32 or bfloat16: see `storage_format`
        self._packing = str(codec.dtype).removeprefix("torch.") if plain else codec.packing
        self._seen: Pages | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Float[Tensor, "C K"]) -> None:
        """Write rows to the sequence's own blocks; pass over those that are sealed."""
        first, self._count = self._count, self._count + rows.shape[0]
        sealed = self._blocks.num_sealed * self._per_block
        start = max(first, sealed)
        if start >= self._count:
            return
        places = torch.arange(start, self._count, device=rows.device)
        page, slot = self._places(places)
        self._pages[page, slot] = self._codec.pack(rows[start - first :])

    def rows(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "C K"]:
        """Return consecutive rows."""
        stop = self._count if stop is None else min(stop, self._count)
        low, high = start // self._per_block, -(-stop // self._per_block)
        pages = self._pages[self._blocks.table[low:high]]
        offset = low * self._per_block
        stored = pages.flatten(0, 1)[start - offset : stop - offset]
        return self._codec.unpack(stored, self._dtype)

    def gather(self, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape K"]:
        """Return rows by number."""
        page, slot = self._places(index)
        return self._codec.unpack(self._pages[page, slot], self._dtype)

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on; sealed ones stay where they are."""
        assert count <= self._count
        self._count = count

    def num_bytes(self) -> int:
        """Return the bytes that the rows occupy."""
        return self._count * self._codec.row_bytes

    def pages(self) -> Pages:
        """Return where the rows lie."""
        table = self._blocks.table
        if self._seen is None or self._seen.table is not table:
            self._seen = Pages(self._pages, table, self._packing)
        return self._seen

    def with_room(self, count: int, width: int, dtype: torch.dtype) -> Pages | None:
        """Return where the rows lie: the next ones are of a block, which the engine has reserved. None where it is sealed."""
        block = self._count // self._per_block
        is_own = self._blocks.num_sealed <= block < len(self._blocks.ids)
        return self.pages() if is_own else None

    def extend_to(self, count: int) -> None:
        """Count rows that have been written in place."""
        self._count = count

    def _places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self._blocks.table[index // self._per_block], index % self._per_block


class BlockStorage:
    """The content of all blocks, allocated once.

    Args:
        model: Whose layers it serves.
        stored: Format of rows.
        num_blocks: How many blocks there are room for.
    """

    def __init__(self, model: Transformer, stored: StorageFormat, num_blocks: int) -> None:
        self._model = model
        self._stored = stored
        self.num_blocks = num_blocks
        device = model.device
        self.pages: dict[tuple[int, str], tuple[Tensor, Codec]] = {}
        """By layer and field of `LayerCache`: [blocks, rows of a block, width], and its codec."""
        for idx, kind in enumerate(model.config.layer_kinds):
            if kind is LayerKind.SWA:
                continue
            per_block = BLOCK_TOKENS // _RATES[kind]
            fields = {"entries": stored.entries}
            if kind is LayerKind.CSA:
                fields["index_keys"] = stored.index_keys
            for name, codec in fields.items():
                shape = (num_blocks, per_block, codec.width)
                self.pages[idx, name] = torch.empty(shape, dtype=codec.dtype, device=device), codec

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block in all layers."""
        return sum(p.shape[1] * codec.row_bytes for p, codec in self.pages.values())

    def new_sequence(self, blocks: SequenceBlocks, num_tokens: int) -> SequenceCache:
        """Return a cache at a multiple of 128 tokens whose windows and tails are empty."""
        cache = self._model.new_cache()
        cache.num_tokens = num_tokens
        for (idx, name), (pages, codec) in self.pages.items():
            rate = _RATES[self._model.config.layer_kinds[idx]]
            store = PagedEntries(pages, codec, blocks, self._model.dtype, num_tokens // rate)
            setattr(cache.layers[idx], name, store)
        return cache

    def read_block(self, block: int) -> list[Tensor]:
        """Return the stored rows of one block, in the order of `pages`."""
        return [pages[block] for pages, _ in self.pages.values()]

    def write_block(self, block: int, rows: list[Tensor]) -> None:
        """Fill a block with stored rows."""
        for (pages, _), part in zip(self.pages.values(), rows, strict=True):
            pages[block] = part

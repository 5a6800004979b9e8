"""A block for sequences that have one new token each, as in decoding, with the work of the library in two calls.

Everything is what `Block.forward` does, in the same order and to the last bit; what is left out is what Python and
torch do between: a token takes a dozen of small steps in every layer, and each costs more than what it computes.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from hadal.model.attention import Attention
from hadal.model.batch import RaggedBatch
from hadal.model.cache import EntryStore, LayerCache
from hadal.model.compressor import Compressor, Tail
from hadal.model.kernels.blocks import (
    NOWHERE,
    Room,
    begin_block,
    end_block,
    float_bits,
    seen_entries,
)
from hadal.model.kernels.mixing import MOST_STREAMS
from hadal.model.kernels.native import LANES, has_kernel
from hadal.model.kernels.plans import Numbers, addresses, tables_of
from hadal.model.sharding import WHOLE
from hadal.model.tape import TailTape

if TYPE_CHECKING:
    from hadal.model.block import Block

__all__ = ["one_token_each"]


def one_token_each(
    block: "Block",
    streams_TMD: Tensor,
    ids_T: Tensor,
    batch: RaggedBatch,
    caches: list[LayerCache],
) -> Tensor | None:
    """Return the streams after a block; None where kernels do not do all of it, or a call may be rewound."""
    tables = _tables(block, streams_TMD, batch, caches)
    if tables is None:
        return None
    layer, before, after, feed = tables
    attn, rotation = block.attn, batch.rotation(block.attn.kind)
    streams_TMD = streams_TMD.contiguous()
    room = _room(attn, streams_TMD)
    taken = [_Taken(cache) for cache in caches]
    places = [place for token in taken for place in token.places]
    begin_block(streams_TMD, batch.positions_T, rotation, layer, before, room, places)
    seen: list[int] = []
    for token, start in zip(taken, batch.starts, strict=True):
        token.compress(attn)
        seen += token.seen(attn, start)
    if attn.indexer is not None:
        assert room.index_query is not None
        room.index_query = attn.indexer.simulate_storage(room.index_query).contiguous()
    return end_block(streams_TMD, ids_T.long(), rotation, layer, after, feed, room, seen)


class _Taken:
    """One sequence's cache, with room for a token that it takes up.

    Args:
        cache: Of the layer.

    Attributes:
        places: Where the token's window key goes, and what compressor and indexer make of it.
    """

    def __init__(self, cache: LayerCache) -> None:
        cache.step = None
        self._cache = cache
        own, self._near, self._before = cache.next_key()
        self._tapes: list[TailTape | None] = [None, None]
        self.places = [own]
        for n, name in enumerate(("tail", "index_tail")):
            if getattr(cache, name) is None:
                self.places += NOWHERE
            else:
                tape = self._tapes[n] = cache.next_of_tail(name)
                self.places += tape.push()

    def compress(self, attn: Attention) -> None:
        """Turn the windows that are full now into entries, and into index keys."""
        cache, (tape, index_tape) = self._cache, self._tapes
        if tape is not None:
            assert attn.compressor is not None
            entries, cache.tail = _compressed(tape, attn.compressor, cache.entries)
            if entries is not None:
                cache.entries.append(attn.simulate_storage(entries))
        if index_tape is not None:
            assert attn.indexer is not None
            keys, cache.index_tail = _compressed(
                index_tape, attn.indexer.compressor, cache.index_keys
            )
            if keys is not None:
                cache.index_keys.append(attn.indexer.simulate_storage(keys))

    def seen(self, attn: Attention, position: int) -> list[int]:
        """Return what the token attends to, as `end_block` takes it."""
        cache, config = self._cache, attn.config
        rate = attn.compressor.rate if attn.compressor is not None else 1
        entries = (
            cache.entries.pages() if attn.compressor is not None and len(cache.entries) else None
        )
        chooses = attn.indexer is not None and len(cache.index_keys) > config.index_topk
        keys = cache.index_keys.pages() if chooses else None
        visible = (position + 1) // rate
        return [self._near, self._before, visible, *seen_entries(entries), *seen_entries(keys)]


def _compressed(
    tape: TailTape, compressor: Compressor, store: EntryStore
) -> tuple[Tensor | None, Tail]:
    """Return the entry that a token makes full, if it does, and the tail behind it."""
    row = tape.full_row()
    return (None, tape.tail) if row is None else compressor(*row, tape.tail, len(store))


def _room(attn: Attention, streams_TMD: Tensor) -> Room:
    config, streams = attn.config, attn.config.hc_mult
    index = (config.index_n_heads, config.index_head_dim) if attn.indexer is not None else (0, 0)
    return Room(streams_TMD, attn.num_heads * config.head_dim, (2 + streams) * streams, index)


def _tables(
    block: "Block", streams_TMD: Tensor, batch: RaggedBatch, caches: list[LayerCache]
) -> list[Tensor] | None:
    """Return what the library reads of the block; None where it does not do all of it."""
    if max(batch.lengths) > 1 or any(batch.rewindable) or not has_kernel(streams_TMD):
        return None
    config = block.attn.config
    if block.attn.shard is not WHOLE or not block.mhc_float32:
        return None
    if config.head_dim % LANES or config.hc_mult > MOST_STREAMS:
        return None
    if not all(_is_paged(store) for c in caches for store in (c.entries, c.index_keys)):
        return None
    found = tables_of(block, lambda: _described(block))
    if found is None:
        return None
    tables = [table for table in found if table is not None]
    return tables if len(tables) == len(found) else None


def _is_paged(store: EntryStore) -> bool:
    return not len(store) or store.pages() is not None


def _described(block: "Block") -> list[Numbers | None]:
    """Return the numbers of a layer, and its matrices: before the softmax, behind it, and those of the experts."""
    attn, ffn, config = block.attn, block.ffn, block.config
    numbers: Numbers = []
    for site, norm in (("attn", block.attn_norm), ("ffn", block.ffn_norm)):
        numbers += addresses(
            *(getattr(block, f"hc_{site}_{n}") for n in ("fn", "base", "scale")), norm.weight
        )
    numbers += addresses(attn.attn_sink)
    sizes, precision, indexer = attn.sizes, attn.precision, attn.indexer
    numbers += [
        config.hc_mult, config.hidden_size, sizes.heads, sizes.head_dim, sizes.latent, attn.num_groups,
        attn.wo_a.out_features, sizes.kind, sizes.compressed, sizes.index_heads, sizes.index_dim, sizes.index_compressed,
        len(ffn.experts) + 1, config.num_experts_per_tok, config.index_topk, config.sliding_window,
        config.qk_rope_head_dim, config.hc_sinkhorn_iters, precision.activations_fp8, precision.kv_fp8,
        precision.index_scores_bf16,
    ]  # fmt: skip
    numbers += float_bits(
        config.rms_norm_eps, config.hc_eps, 0.0 if indexer is None else indexer.scale,
        config.routed_scaling_factor, ffn.shared_experts.limit,
    )  # fmt: skip
    return [numbers, *attn.described(), *ffn.described()]

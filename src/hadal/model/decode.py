"""A run of blocks for sequences that have one new token each, as in decoding, in one call of the library.

Everything is what `Block.forward` does, in the same order and to the last bit; what is left out is what Python and
torch do between: a token takes dozens of small steps in every layer, and each costs more than what it computes.
"""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hadal.config import LayerKind, ModelConfig
from hadal.model.batch import RaggedBatch
from hadal.model.cache import LayerCache, SequenceCache
from hadal.model.kernels.attention import Pages
from hadal.model.kernels.decode import SPAN_TOKENS, decode_layers, float_bits
from hadal.model.kernels.mixing import MOST_STREAMS
from hadal.model.kernels.native import LANES, has_kernel
from hadal.model.kernels.plans import Numbers, addresses, tables_of
from hadal.model.rope import rotation
from hadal.model.sharding import WHOLE
from hadal.model.tape import SequenceTape

if TYPE_CHECKING:
    from hadal.model.block import Block

__all__ = ["one_token_each"]

_TABLES = 4
"""Of a block: its numbers, and its matrices before the softmax, behind it, and of the experts."""


def one_token_each(
    blocks: Sequence["Block"],
    streams_TMD: Tensor,
    ids_T: Tensor,
    batch: RaggedBatch,
    caches: Sequence[SequenceCache],
) -> Tensor | None:
    """Return the streams behind blocks, and take the tokens up; None where kernels do not do all of it.

    They do not where a call may be rewound. After a failure the caches are as they were before.
    """
    if max(batch.lengths) > 1 or any(batch.rewindable) or not has_kernel(streams_TMD):
        return None
    tables = _tables(blocks)
    if tables is None:
        return None
    tapes = [_tape(blocks, cache) for cache in caches]
    going = [tape for tape in tapes if tape is not None]
    if len(going) < len(tapes):
        return None
    sequences = list(chain.from_iterable(tape.numbers() for tape in going))
    out = decode_layers(streams_TMD.contiguous(), ids_T.long(), tables, sequences)
    for tape in going:
        tape.advance()
    return out


def _tape(blocks: Sequence["Block"], cache: SequenceCache) -> SequenceTape | None:
    """Return what takes up a sequence's next token; None where its entries lie in no form that kernels write."""
    position, tape = cache.num_tokens, cache.tape
    if tape is not None and tape.goes_on(blocks[0], cache.kept, position):
        return tape
    config, layers = blocks[0].attn.config, cache.layers
    pages: list[list[Pages | None]] = []
    for block, layer in zip(blocks, layers, strict=True):
        found = _room(block, layer, position)
        if found is None:
            return None
        pages.append(found)
    span = torch.arange(SPAN_TOKENS) + position // SPAN_TOKENS * SPAN_TOKENS
    plain, far = (rotation(config, kind, span) for kind in (LayerKind.SWA, LayerKind.CSA))
    cache.tape = SequenceTape(blocks[0], layers, position, (plain, far), pages)
    return cache.tape


def _room(block: "Block", layer: LayerCache, position: int) -> list[Pages | None] | None:
    """Return where a layer's entries and index keys lie, with room for those up to the end of a tape."""
    config, dtype = block.attn.config, layer.window.dtype
    stores = [
        (layer.tail, layer.entries, config.head_dim),
        (layer.index_tail, layer.index_keys, config.index_head_dim),
    ]
    found: list[Pages | None] = []
    for tail, store, width in stores:
        if tail is None:
            found.append(None)
            continue
        if len(store) != position // tail.rate or tail.kv.shape[0] != position % tail.rate:
            return None
        pages = store.with_room(SPAN_TOKENS // tail.rate, width, dtype)
        if pages is None:
            return None
        found.append(pages)
    return found


def _tables(blocks: Sequence["Block"]) -> Tensor | None:
    """Return the addresses of what the library reads of the blocks; None where it does not do all of it."""
    found: list[Tensor] = []
    for block in blocks:
        tables = tables_of(block, lambda block=block: _described(block))
        if tables is None:
            return None
        own = [table for table in tables if table is not None]
        if len(own) < _TABLES:
            return None
        found += own
    known = blocks[0].__dict__.get("_kernel_run")
    if known is None or len(known[0]) != len(found) or not all(map(is_, known[0], found)):
        places = torch.tensor([t.data_ptr() for t in found], dtype=torch.int64)
        known = blocks[0].__dict__["_kernel_run"] = found, places.view(-1, _TABLES)
    return known[1]


def _described(block: "Block") -> list[Numbers | None]:
    """Return the tables of a block."""
    attn, ffn, config = block.attn, block.ffn, block.config
    if attn.shard is not WHOLE or not block.mhc_float32 or not _has_sizes(config):
        return [None] * _TABLES
    numbers: Numbers = []
    for site, norm in (("attn", block.attn_norm), ("ffn", block.ffn_norm)):
        numbers += addresses(
            *(getattr(block, f"hc_{site}_{n}") for n in ("fn", "base", "scale")), norm.weight
        )
    sizes, precision, compressor, indexer = (
        attn.sizes,
        attn.precision,
        attn.compressor,
        attn.indexer,
    )
    numbers += addresses(
        attn.attn_sink,
        None if compressor is None else compressor.norm.weight,
        None if indexer is None else indexer.compressor.norm.weight,
    )
    numbers += [
        config.hc_mult, config.hidden_size, sizes.heads, sizes.head_dim, sizes.latent, attn.num_groups,
        attn.wo_a.out_features, sizes.kind, sizes.compressed, sizes.index_heads, sizes.index_dim, sizes.index_compressed,
        len(ffn.experts) + 1, config.num_experts_per_tok, config.index_topk, config.sliding_window,
        1 if compressor is None else compressor.rate, config.qk_rope_head_dim, config.hc_sinkhorn_iters,
        precision.activations_fp8, precision.kv_fp8, precision.index_fp4, precision.index_scores_bf16,
    ]  # fmt: skip
    numbers += float_bits(
        config.rms_norm_eps, config.hc_eps, 0.0 if indexer is None else indexer.scale,
        config.routed_scaling_factor, ffn.shared_experts.limit,
        sizes.index_dim**-0.5 if precision.index_hadamard else 0.0,
    )  # fmt: skip
    return [numbers, *attn.described(), *ffn.described()]


def _has_sizes(config: ModelConfig) -> bool:
    index = config.index_head_dim
    whole = index % 32 == 0 and index & (index - 1) == 0  # blocks of FP4, and a Hadamard matrix
    return config.head_dim % LANES == 0 and config.hc_mult <= MOST_STREAMS and whole

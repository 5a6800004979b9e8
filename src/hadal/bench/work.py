"""The least that a pass has to compute and to read, from the formulas of `hadal.cost`.

What it costs a network that attends only to what its indexer chose. A side that does more than that
(dense attention under a mask, logits of every token) is not excused.
"""

from hadal.config import LayerKind, ModelConfig
from hadal.cost.flops import flops_per_token
from hadal.cost.inventory import Store, inventory

__all__ = ["decode_bytes", "prefill_flops"]

_SAMPLES = 256
"""Positions at which a prompt's FLOPs are taken; between them they are nearly linear."""


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Return the FLOPs of a prompt: two a multiply-add, the head only for its last token."""
    places = [tokens * (i + 0.5) / _SAMPLES for i in range(_SAMPLES)]
    head = next(f.count for f in flops_per_token(config, tokens) if f.part == "head")
    each = [sum(f.count for f in flops_per_token(config, round(p))) - head for p in places]
    return tokens * sum(each) / _SAMPLES + head


def decode_bytes(
    config: ModelConfig,
    context: int,
    *,
    bits: int = 32,
    expert_bits: float | None = None,
    fp8_bits: float | None = None,
) -> float:
    """Return the bytes read for one token: the active weights and the cache that it looks at.

    Args:
        config: The network.
        context: Tokens before it.
        bits: Of a weight and of a channel in the cache.
        expert_bits: Of a weight of a routed expert, if others.
        fp8_bits: Of a weight that checkpoints store in FP8, if others.
    """
    weights = 0.0
    for group in inventory(config):
        if not group.mtp and group.multiplied:
            own = {Store.EXPERT: expert_bits, Store.FP8: fp8_bits}.get(group.store)
            weights += group.used * group.size * (own or bits) / 8
    chosen = min(config.index_topk, context // 4)
    per_csa = chosen * config.head_dim + context // 4 * config.index_head_dim
    channels = (
        config.count(LayerKind.CSA) * per_csa
        + config.count(LayerKind.HCA) * (context // 128) * config.head_dim
        + config.num_hidden_layers * min(config.sliding_window, context) * config.head_dim
    )
    return weights + channels * bits / 8

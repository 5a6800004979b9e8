"""Small networks for tests: each with every mechanism of its kind, none with a friendly size."""

import dataclasses

from hadal.config import ModelConfig, YarnScaling

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=16,
    sliding_window=16,
    compress_ratios=(0, 0, 0),
    index_n_heads=16,
    index_head_dim=32,
    index_topk=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    num_hash_layers=0,
    routed_scaling_factor=1.5,
    swiglu_limit=1.0,  # low enough that the clamp acts
    rope_scaling=YarnScaling(factor=16.0, original_max_position_embeddings=512),
    max_position_embeddings=8192,
)


def schedule(*ratios: int, **changes: object) -> ModelConfig:
    """Return a small config with these layers and one MTP block."""
    return dataclasses.replace(
        SMALL, num_hidden_layers=len(ratios), compress_ratios=(*ratios, 0), **changes
    )


CONFIGS = {
    "window_only": schedule(0, 0),
    "csa_only": schedule(4, 4),
    "hca_only": schedule(128, 128),
    "flash_like": schedule(0, 0, 4, 128, 4, num_hash_layers=3, sliding_window=128),
    "pro_like": schedule(128, 4, 128, 4, num_hash_layers=1, routed_scaling_factor=2.5),
    "odd": schedule(
        0,
        4,
        128,
        vocab_size=331,
        hidden_size=36,
        num_attention_heads=6,
        head_dim=40,
        qk_rope_head_dim=12,
        index_head_dim=24,
        index_n_heads=9,
        q_lora_rank=11,
        o_groups=3,
        o_lora_rank=7,
        sliding_window=13,
        index_topk=7,
        n_routed_experts=5,
        moe_intermediate_size=27,
        hc_mult=3,
        hc_sinkhorn_iters=7,
        num_hash_layers=1,
    ),
}

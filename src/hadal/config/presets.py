"""Sizes of the published networks and of our own nano, as keyword arguments of `ModelConfig`.

Figures: report section 4.2.1 and the published config.json files. Formats of the stored weights are
not here: instruct and Base share these numbers.
"""

from typing import Any, Final

__all__ = ["FLASH", "NANO", "NARROW", "PRO"]

_SHARED: Final[dict[str, Any]] = {
    "vocab_size": 129_280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
}

FLASH: Final[dict[str, Any]] = _SHARED | {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "index_topk": 512,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "compress_ratios": (0, 0, *(4, 128) * 20, 4, 0),
}

PRO: Final[dict[str, Any]] = _SHARED | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "compress_ratios": (128, 128, *(4, 128) * 29, 4, 0),
}

NARROW: Final[dict[str, Any]] = {
    "vocab_size": 1024,
    "hidden_size": 160,
    "num_attention_heads": 8,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 144,
    "o_lora_rank": 48,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 32,
    "n_routed_experts": 8,
    "moe_intermediate_size": 96,
}
"""Widths for a checkpoint with all layers of a large one; some matrices end in part of a block."""

NANO: Final[dict[str, Any]] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "compress_ratios": (0, 4, 128, 4, 128, 4, 0),
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
}

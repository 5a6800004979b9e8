"""What serving a model takes in memory, planned before the first request.

Blocks are not all: every live request has a slot, and a step needs scratch that grows with its tokens
and with the longest context in it. Engines that count only blocks run out of memory in the middle of a
long prompt; here the cache gets what is left after the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hadal.config import LayerKind, ModelConfig
from hadal.engine.storage_format import StorageFormat
from hadal.model.kernels.decode import SPAN_TOKENS
from hadal.model.kernels.native import has_kernel

__all__ = ["MemoryPlan", "free_bytes", "scratch_bytes", "slot_bytes"]

_QUERY_BLOCK = 64
"""Queries that attention and the indexer work on at a time."""
_KEY_BLOCK = 1024
"""Index keys that are scored at a time."""
_MOST_SCORES, _MOST_UNPACKED = 4 << 20, 16 << 20
"""Numbers of native/choose.h and native/attend.h."""
_LEFT_BETWEEN = 1.3
"""What the C library holds for tensors over what they are: 0.9 to 1.5, another in every run (dev/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose.

    Attributes:
        weights: Parameters and buffers.
        blocks: Compressed entries, `num_blocks` times `block_bytes`.
        num_blocks: Blocks of 128 tokens.
        block_bytes: Of one.
        slots: Windows and tails of `max_num_seqs` requests.
        scratch: Most that a step needs beside.
        checkpoints: Most that checkpoints may take.
    """

    weights: int
    blocks: int
    num_blocks: int
    block_bytes: int
    slots: int
    scratch: int
    checkpoints: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.blocks + self.slots + self.scratch + self.checkpoints


def free_bytes(device: torch.device) -> int:
    """Return the memory that could be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def slot_bytes(config: ModelConfig, stored: StorageFormat, dtype: torch.dtype) -> int:
    """Return the most that one request's windows and tails take, with the tape of its single tokens."""
    seen = config.sliding_window - 1
    window = (2 * seen + SPAN_TOKENS) * config.head_dim * dtype.itemsize
    csa = 4 * _csa_rows(config.head_dim) + 4 * _csa_rows(config.index_head_dim)
    hca = 4 * 2 * (127 + 128) * config.head_dim
    rotations = 4 * 4 * SPAN_TOKENS * config.qk_rope_head_dim // 2
    return (
        (config.num_hidden_layers + config.num_nextn_predict_layers) * window
        + config.count(LayerKind.CSA) * csa
        + config.count(LayerKind.HCA) * hca
        + rotations
    )


def _csa_rows(width: int) -> int:
    """Return the floats of a CSA tail: 3 tokens of twice the width, half of the 4 before, and a ring of 8."""
    return 2 * (3 * 2 * width + 4 * width + 8 * 2 * width)


def scratch_bytes(config: ModelConfig, num_tokens: int, context: int, like: Tensor) -> int:
    """Return about what a step of so many tokens takes, with one context of this length.

    Args:
        config: Of the model.
        num_tokens: Of a step.
        context: Tokens of the longest sequence in it.
        like: Any tensor of the dtype and on the device of the model.
    """
    num_tokens = min(num_tokens, context)
    if has_kernel(like):
        live = _kernel_tokens(config, num_tokens, context, like.dtype.itemsize)
        return int(_LEFT_BETWEEN * (live + _kernel_rooms(config, num_tokens, context, like.dtype)))
    return _module_scratch(config, num_tokens, context)


def _kernel_tokens(config: ModelConfig, num_tokens: int, context: int, size: int) -> int:
    """Return what tensors take at their most: while a CSA layer attends, or makes its entries."""
    attended = config.num_attention_heads * config.head_dim
    compressed, index_compressed = 4 * config.head_dim, 4 * config.index_head_dim  # keys and logits
    streams = (config.hc_mult + 1) * config.hidden_size
    index = config.index_n_heads * (config.index_head_dim + 1)
    projected = size * (streams + attended + config.head_dim + index) + 4 * (
        compressed + index_compressed
    )
    rotations = 4 * 2 * config.qk_rope_head_dim + 2 * 8
    chosen = min(config.index_topk, context // 4) * 9  # a number and a truth each
    middle = config.o_groups * config.o_lora_rank + config.hidden_size
    attending = chosen + size * (attended + middle)
    compressing = 4 * 4 * compressed
    return num_tokens * (projected + rotations + max(attending, compressing))


def _kernel_rooms(config: ModelConfig, num_tokens: int, context: int, dtype: torch.dtype) -> int:
    """Return what the library keeps for itself, in floats: native/parallel.c."""
    halves = dtype == torch.bfloat16
    attended = config.num_attention_heads * config.head_dim
    experts = config.num_experts_per_tok + 1  # and the shared one
    a_token = max(attended, config.hidden_size) if halves else config.hidden_size
    a_token += experts * config.moe_intermediate_size + config.hidden_size + 3 * experts
    a_token += config.head_dim if halves else 0
    entries = max(
        n for n in (context // 4, context // 128) if n * config.head_dim <= _MOST_UNPACKED
    )
    scores = min(64 * context // 4, _MOST_SCORES + context // 4)
    return 4 * (num_tokens * a_token + entries * config.head_dim + scores) * 5 // 4


def _module_scratch(config: ModelConfig, num_tokens: int, context: int) -> int:
    """Return what the modules take.

    Wide per-token tensors live for the whole step; attention works on blocks of queries, in float64 on
    a float32 model, over a window, the chosen entries, and all entries of an HCA layer.
    """
    width, heads = config.head_dim, config.num_attention_heads
    streams = 6 * config.hc_mult * config.hidden_size
    projected = heads * width * 4 + config.index_n_heads * config.index_head_dim * 2
    experts = 4 * config.num_experts_per_tok * config.moe_intermediate_size
    per_token = 4 * (streams + projected + experts)
    dense = context // 128
    gathered = _QUERY_BLOCK * config.index_topk * width * 8
    attended = config.sliding_window + _QUERY_BLOCK + max(dense, config.index_topk)
    logits = 4 * _QUERY_BLOCK * heads * attended * 8
    entries = 3 * dense * width * 8
    scores = _QUERY_BLOCK * (_KEY_BLOCK + config.index_topk) * (2 * config.index_n_heads + 12) * 4
    return num_tokens * per_token + gathered * 2 + logits + entries + scores

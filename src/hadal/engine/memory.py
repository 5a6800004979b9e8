"""What serving a model takes in memory, planned before the first request.

Blocks are not all: every live request has a slot, and a step needs scratch that grows with its tokens
and with the longest context in it. Engines that count only blocks run out of memory in the middle of a
long prompt; here the cache gets what is left after the rest.
"""

from dataclasses import dataclass

import torch

from hadal.config import LayerKind, ModelConfig
from hadal.engine.storage_format import StorageFormat
from hadal.model.tape import MORE_KEYS

__all__ = ["MemoryPlan", "free_bytes", "scratch_bytes", "slot_bytes"]

_QUERY_BLOCK = 64
"""Queries that attention and the indexer work on at a time."""
_KEY_BLOCK = 1024
"""Index keys that are scored at a time."""


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
    """Return the most that one request's windows and tails take."""
    window = (config.sliding_window - 1 + MORE_KEYS) * config.head_dim * dtype.itemsize
    csa = 4 * _csa_rows(config.head_dim) + 4 * _csa_rows(config.index_head_dim)
    hca = 4 * 2 * 127 * config.head_dim
    return (
        (config.num_hidden_layers + config.num_nextn_predict_layers) * window
        + config.count(LayerKind.CSA) * csa
        + config.count(LayerKind.HCA) * hca
    )


def _csa_rows(width: int) -> int:
    """Return the floats of a CSA tail: 3 tokens of twice the width, and half of the 4 before."""
    return 2 * (3 * 2 * width + 4 * width)


def scratch_bytes(config: ModelConfig, num_tokens: int, context: int) -> int:
    """Return about what a step of so many tokens takes, with one context of this length.

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

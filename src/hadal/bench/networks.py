"""The networks that are measured: random ones, and a small one that has learned something."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import torch

from hadal.bench.gguf import write_gguf
from hadal.checkpoint import save
from hadal.config import ModelConfig
from hadal.model import Precision, Transformer, randomize

__all__ = ["NETWORKS", "FileKind", "NetworkName", "network", "write_network"]

NetworkName = Literal["a192", "nano"]
FileKind = Literal["official", "huggingface", "stored", "gguf"]

NETWORKS: Final[dict[str, ModelConfig]] = {
    "a192": ModelConfig(
        vocab_size=16_384,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=256,
        o_groups=4,
        o_lora_rank=128,
        sliding_window=128,
        compress_ratios=(0, 0, *(4, 128) * 5, 0),
        index_n_heads=8,
        index_head_dim=64,
        index_topk=512,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        num_hash_layers=3,
        routed_scaling_factor=1.5,
    ),
    "nano": ModelConfig.nano(),
}
"""A192: 192 million parameters, 70 million of them active, with every mechanism of V4-Flash."""


def network(
    name: NetworkName, *, dtype: torch.dtype = torch.float32, precision: Precision | None = None
) -> Transformer:
    """Return a network with random weights, seed 0."""
    model = Transformer(NETWORKS[name], dtype=dtype, precision=precision)
    randomize(model, 0)
    return model


def write_network(name: NetworkName, folder: Path, kinds: Iterable[FileKind]) -> None:
    """Write a network once for all sides that load it, by kind: `folder / kind`.

    `official` and `huggingface` hold float32 in either layout, `stored` what a published checkpoint does: experts in
    FP4, most else in FP8, the rest in BF16. `gguf` is for llama.cpp.
    """
    model = network(name)
    for kind in kinds:
        path = folder / kind
        if kind == "gguf":
            write_gguf(model, path)
        elif kind == "stored":
            half = network(name, dtype=torch.bfloat16)
            save(half, path, config=model.config.quantized("instruct"))
        else:
            save(model, path, layout=kind)

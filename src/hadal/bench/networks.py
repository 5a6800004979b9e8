"""The networks that are measured: random ones, and a small one that has learned something."""

import tempfile
from pathlib import Path
from typing import Final, Literal

import torch

from hadal.checkpoint import load, save
from hadal.config import ModelConfig
from hadal.model import Precision, Transformer, randomize

__all__ = ["NETWORKS", "NetworkName", "network", "network_as_stored"]

NetworkName = Literal["a192", "nano"]

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


def network_as_stored(name: NetworkName) -> Transformer:
    """Return the same network as a published checkpoint stores it: experts in FP4, most else in FP8, the rest in BF16.

    Its arithmetic rounds nothing else, as that of the others.
    """
    model = network(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save(model.to(torch.bfloat16), path, config=model.config.quantized("instruct"))
        stored = load(path, dtype=torch.bfloat16, precision=Precision.exact())
        for parameter in stored.parameters():  # the folder goes
            parameter.data = parameter.data.clone()
    return stored

"""Weights to start training from, and weights to test with.

`initialize` is a choice of ours where the report is silent (spec 8.3: constants of mHC, hash
tables). `randomize` leaves no parameter at zero or one: sinks, positional biases, mHC parameters,
routing biases and hash tables that are constant hide bugs.
"""

import math

import torch
from torch import Tensor, nn

from hadal.config import ModelConfig

__all__ = ["initialize", "randomize"]

_KEEP_STREAMS = 3.0
"""Static logit of comb's diagonal: a stream keeps 87 % of itself at the start."""


def hash_table(
    vocab_size: int, num_experts: int, num_active: int, generator: torch.Generator
) -> Tensor:
    """Return distinct random experts for every token id, each expert equally likely."""
    draws = torch.rand(vocab_size, num_experts, generator=generator, dtype=torch.float32)
    return draws.topk(num_active, dim=1).indices


def _config(model: nn.Module) -> ModelConfig:
    assert isinstance(model.config, ModelConfig)
    return model.config


def _fill_hash_tables(model: nn.Module, generator: torch.Generator) -> None:
    num_experts = _config(model).n_routed_experts
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            vocab_size, num_active = table.shape
            table.copy_(hash_table(vocab_size, num_experts, num_active, generator))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill a plain model with initial weights.

    Matrices are normal with `initializer_range`, norms 1, sinks and positional biases 0. mHC reads
    the mean of the streams, writes to all with weight 1 and nearly keeps each one, with a small
    dynamic part (the report says only that the scales start small).
    """
    generator = torch.Generator().manual_seed(seed)
    std, streams = _config(model).initializer_range, _config(model).hc_mult
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("hc_") and leaf.endswith("scale"):
            parameter.fill_(0.01)
        elif leaf.startswith("hc_") and leaf.endswith("base"):
            parameter.zero_()
            others = max(streams - 1.0, 0.01)  # sigmoid = 1 / streams, or nearly 1 for one stream
            parameter[:streams] = -math.log(others)
            if parameter.shape[0] > streams:
                parameter[2 * streams :] = _KEEP_STREAMS * torch.eye(streams).flatten()
        elif leaf in ("attn_sink", "ape", "bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
            )
    _fill_hash_tables(model, generator)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fill a plain model with weights for tests: everything random, activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if leaf == "bias":
            noise *= 0.05
        elif leaf == "ape" or leaf.endswith("base") or leaf == "attn_sink":
            noise *= 0.5
        elif leaf.endswith("scale") or "norm" in name:
            noise = 1 + 0.2 * noise
        elif name.startswith("embed"):
            noise *= 0.5
        else:
            noise *= parameter.shape[1] ** -0.5 * (0.5 if name.startswith("head") else 1.0)
        parameter.copy_(noise)
    _fill_hash_tables(model, generator)

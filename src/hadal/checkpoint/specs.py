"""What a checkpoint of a config must hold: names, dtypes and shapes, read off the modules.

The model is built on the meta device, in its stored formats, without memory; nothing here is a
table that could drift from the code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hadal.config import ModelConfig
from hadal.model import Transformer

__all__ = ["FLOATS", "TensorSpec", "meta_model", "plain_dtype", "tensor_specs"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of tensors that are not quantised."""


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def plain_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """Return the dtype of a checkpoint's unquantised tensors, as its embedding has it.

    BF16 where that says nothing sensible; the comparison with the model reports the tensor then.
    """
    embedding = specs.get("embed.weight")
    return embedding.dtype if embedding and embedding.dtype in FLOATS else torch.bfloat16


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Return the model of a config on the meta device, stored as a checkpoint stores it."""
    with torch.device("meta"):
        return Transformer(config, storage="checkpoint", dtype=dtype)


def tensor_specs(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
    """Return every tensor of a checkpoint under its official name, in the order of the modules.

    Args:
        config: Sizes and stored formats.
        dtype: Of tensors that are never quantised and not kept in float32.
    """
    state = meta_model(config, dtype).state_dict()
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in state.items()}

"""The Walsh-Hadamard rotation of indexer queries and keys (spec/model.md 2.8)."""

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.errors import InputError

__all__ = ["hadamard"]


def hadamard(x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows K"]:
    """Multiply the last axis by the Sylvester-ordered Hadamard matrix, scaled to be orthogonal.

    Apply it to queries and keys alike or to neither: it cancels in their product, and a one-sided
    rotation destroys retrieval beyond `4 * index_topk` tokens (spec T7).

    Raises:
        InputError: K is not a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1):
        raise InputError(f"Hadamard rotation needs a power of two, got width {width}")
    y = x.float()  # rounded once, at the end
    step = 1
    while step < width:
        low, high = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        step *= 2
    return (y * width**-0.5).to(x.dtype)

"""Activations whose bits do not depend on where in a tensor an element lies.

torch computes sigmoid, silu, softplus and softmax with vector instructions, but the last few elements of a
tensor (or of a thread's share) with scalar ones, which round differently: a token's expert weights
then depend on its neighbours in the batch. Its `exp` has no such seam, so these are built on it.
See `product.py` for why the last bits matter.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["sigmoid", "silu", "softmax", "softplus"]

_LOWEST = -80.0
"""Below it a sigmoid is 0 for every purpose, and exp of its negative still has a finite square."""


def sigmoid(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `1 / (1 + e^-x)`."""
    return 1 / (1 + torch.exp(-x.clamp(min=_LOWEST)))


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x sigmoid(x)`."""
    return x * sigmoid(x)


def softmax(x: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Return `e^x / sum e^x` along an axis in which at least one element is finite."""
    exponential = torch.exp(x - x.amax(dim=dim, keepdim=True))
    return exponential / exponential.sum(dim=dim, keepdim=True)


def softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `log(1 + e^x)`, in the form that overflows for no x."""
    return torch.maximum(x, torch.zeros_like(x)) + torch.log1p(torch.exp(-x.abs()))

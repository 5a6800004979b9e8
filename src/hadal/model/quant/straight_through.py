"""The straight-through estimator: round forward, pass the gradient unchanged backward."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["straight_through"]


class _StraightThrough(torch.autograd.Function):
    # The usual `x + (rounded - x).detach()` is off by a rounding of the sum, so that what is
    # computed with would differ from what is stored.
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return exactly `rounded`, with the gradient of `x`."""
    result: Tensor = _StraightThrough.apply(x, rounded.to(x.dtype))  # pyright: ignore
    return result

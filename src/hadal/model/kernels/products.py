"""Products on the processor, with matrices as they are stored: native/product.h."""

import torch
from torch import Tensor

from hadal.model.kernels.native import call, has_kernel

__all__ = ["FORMATS", "format_of", "native_product"]

FORMATS = ("float32", "bfloat16", "fp8", "fp8 float", "fp4")
"""How a matrix is stored, as the library numbers it."""


def format_of(weight: Tensor, scale: Tensor | None) -> int | None:
    """Return which of `FORMATS` a matrix has; None if none of them."""
    if scale is None:
        return {torch.float32: 0, torch.bfloat16: 1}.get(weight.dtype)
    if weight.dtype == torch.int8:
        return 4
    return 3 if scale.dtype == torch.float32 else 2


def native_product(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, rounds: bool = False, groups: int = 1,
    at: int | None = None,
) -> Tensor | None:  # fmt: skip
    """Return `x W^T` in the dtype of x, W as it is stored; None where there is no kernel for that.

    Summed in float32 and rounded once. The sum of one output has one order, whatever it is computed beside.

    Args:
        x: [T, G I] float32 or bfloat16.
        weight: [O, I] float32, bfloat16 or float8_e4m3fn, or int8 [O, I/2] with two FP4 codes a byte.
        scale: Of tiles or blocks, float8_e8m0fnu; float32 of tiles, too; None for floats.
        rounds: Whether x is rounded to E4M3 first, as `quant.round_trip_activations` does.
        groups: G: columns of x and rows of W come in so many, each for itself.
        at: Which of `native.LEVELS`. Default: the best.
    """
    form = format_of(weight, scale)
    if (
        form is None
        or x.dim() != 2
        or weight.shape[1] * (2 if form == 4 else 1) * groups != x.shape[1]
    ):
        return None  # the module says what does not fit
    if not has_kernel(x, weight if scale is None else None):
        return None
    x, weight = x.contiguous(), weight.contiguous()
    scale = None if scale is None else scale.contiguous()
    rows, outer, inner = x.shape[0], weight.shape[0], x.shape[1] // groups
    y = x.new_empty((rows, outer))
    halves = x.dtype == torch.bfloat16
    call(
        "hadal_product", x.data_ptr(), halves, rows, weight.data_ptr(), None if scale is None else scale.data_ptr(),
        form, inner, outer, groups, rounds, y.data_ptr(), halves, at=at,
    )  # fmt: skip
    return y

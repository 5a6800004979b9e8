"""RMS norm, rotation and rounding of every vector alone: native/rows.h."""

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.model.kernels.native import call, has_kernel

__all__ = ["native_vectors"]


def native_vectors(
    x: Float[Tensor, "T *heads K"], *, norm: float | None = None, weight: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None, inverse: bool = False, as_kept: bool = False,
    at: int | None = None,
) -> Float[Tensor, "T *heads K"] | None:  # fmt: skip
    """Return vectors after what is asked for, in this order; None where there is no kernel for that.

    Args:
        x: float32 or bfloat16.
        norm: Epsilon of an RMS norm.
        weight: Of the norm, [K], in the dtype of x.
        rotation: As `rope.rotate` takes it.
        inverse: Rotate back.
        as_kept: Round as `quant.round_trip_kv_entries` does.
        at: Which of `native.LEVELS`. Default: the best.
    """
    if not has_kernel(x, weight) or (weight is not None and weight.dtype != x.dtype):
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    cos, sin = rotation if rotation is not None else (None, None)
    rotated = 0 if cos is None else 2 * cos.shape[-1]
    tokens, width = x.shape[0], x.shape[-1]
    call(
        "hadal_vectors", x.data_ptr(), out.data_ptr(), x.dtype == torch.bfloat16, tokens,
        x.numel() // max(tokens * width, 1), width, norm is not None, norm or 0.0,
        None if weight is None else weight.data_ptr(), None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(), rotated, inverse, as_kept, at=at,
    )  # fmt: skip
    return out

"""FP8 E4M3: weights in 128x128 blocks, activations in 1x128 blocks (spec/model.md 3.1, 3.2).

Shape letters: O out features, I in features.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hadal.model.quant.scales import (
    check_finite,
    decode_ue8m0,
    encode_ue8m0,
    power_of_two_scale,
)
from hadal.model.quant.straight_through import straight_through

__all__ = [
    "E4M3_MAX",
    "dequantize_fp8",
    "fake_quantize_fp8",
    "quantize_fp8",
    "round_trip_activations",
    "round_trip_blocks",
]

E4M3_MAX = 448.0
_AMAX_FLOOR = 1e-4
_WEIGHT_AMAX_FLOOR = E4M3_MAX * 2.0**-126
"""Only an all-zero block is below it; its scale must still be a number."""
_BLOCK = 128


def quantize_fp8(
    weight_OI: Float[Tensor, "O I"], *, scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> tuple[Tensor, Tensor]:
    """Quantise a matrix to E4M3 with one scale per 128x128 block; edge blocks may be smaller.

    Args:
        weight_OI: Any float dtype.
        scale_dtype: float8_e8m0fnu (powers of two), or float32 as in the Base checkpoints
            (`amax / 448`).

    Returns:
        The float8_e4m3fn matrix, and scales of shape [ceil(O/128), ceil(I/128)].

    Raises:
        InputError: The matrix holds NaN or infinite values.
    """
    check_finite(weight_OI)
    weight = weight_OI.float()
    blocks = F.pad(weight, (0, -weight.shape[1] % _BLOCK, 0, -weight.shape[0] % _BLOCK))
    blocks = blocks.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
    amax = blocks.abs().amax(dim=(1, 3)).clamp_min(_WEIGHT_AMAX_FLOOR)
    if scale_dtype == torch.float32:
        scale = stored_scale = amax / E4M3_MAX
    else:
        scale = power_of_two_scale(amax, E4M3_MAX)
        stored_scale = encode_ue8m0(scale)
    scaled = weight / _spread(scale, weight)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), stored_scale


def dequantize_fp8(weight_OI: Tensor, scale: Tensor) -> Float[Tensor, "O I"]:
    """Return the float32 matrix that an E4M3 matrix and its block scales stand for."""
    weight = weight_OI.float()
    return weight * _spread(decode_ue8m0(scale), weight)


def _spread(scale: Tensor, weight_OI: Tensor) -> Tensor:
    """Repeat block scales to the size of the matrix."""
    rows = scale.repeat_interleave(_BLOCK, dim=0)[: weight_OI.shape[0]]
    return rows.repeat_interleave(_BLOCK, dim=1)[:, : weight_OI.shape[1]]


def round_trip_blocks(x: Float[Tensor, "... I"], block: int) -> Float[Tensor, "... I"]:
    """Cast to E4M3 and back with one power-of-two scale per `block` values of the last axis."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    amax = padded.abs().amax(dim=-1, keepdim=True).clamp_min(_AMAX_FLOOR)
    scale = power_of_two_scale(amax, E4M3_MAX)
    cast = (padded / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (cast * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def round_trip_activations(x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
    """Simulate the dynamic 1x128 quantisation of a matmul's input; straight-through gradient."""
    return straight_through(x, round_trip_blocks(x.detach(), _BLOCK))


def fake_quantize_fp8(
    weight_OI: Float[Tensor, "O I"], *, scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> Float[Tensor, "O I"]:
    """Round a matrix through its stored FP8 form; the gradient passes straight through."""
    stored = quantize_fp8(weight_OI.detach(), scale_dtype=scale_dtype)
    return straight_through(weight_OI, dequantize_fp8(*stored))

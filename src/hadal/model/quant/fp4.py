"""FP4 E2M1 with one UE8M0 scale per 32 values along the input axis (spec/model.md 3.1).

Two codes share a byte: the low nibble holds the even column. Shape letters: O out, I in features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.errors import InputError
from hadal.model.quant.fp8 import E4M3_MAX
from hadal.model.quant.scales import (
    check_finite,
    decode_ue8m0,
    encode_ue8m0,
    power_of_two_scale,
)
from hadal.model.quant.straight_through import straight_through

__all__ = [
    "dequantize_fp4",
    "fake_quantize_fp4",
    "fp4_to_fp8",
    "quantize_fp4",
    "round_trip_fp4",
    "unpack_fp4",
]

FP4_BLOCK = 32
_E2M1_MAX = 6.0
_AMAX_FLOOR = _E2M1_MAX * 2.0**-126
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbours; a value on one goes to the neighbour with the even code."""


def _encode(x: Tensor) -> Tensor:
    """Return E2M1 codes 0..15 of values already scaled into [-6, 6], ties to even."""
    magnitude = x.abs()
    boundaries = torch.tensor(_BOUNDARIES, dtype=torch.float32, device=x.device)
    below = torch.bucketize(magnitude, boundaries, right=False)  # ties stay below
    above = torch.bucketize(magnitude, boundaries, right=True)  # ties go above
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def _decode(code: Tensor) -> Tensor:
    values = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))
    return torch.tensor(values, dtype=torch.float32, device=code.device)[code.long()]


def _scaled_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., I/32, 32] and float32 scales [..., I/32, 1]."""
    if x.shape[-1] % FP4_BLOCK:
        raise InputError(f"FP4 needs a multiple of {FP4_BLOCK} columns, got {x.shape[-1]}")
    blocks = x.float().unflatten(-1, (-1, FP4_BLOCK))
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(_AMAX_FLOOR)
    scale = power_of_two_scale(amax, _E2M1_MAX)
    return _encode((blocks / scale).clamp(-_E2M1_MAX, _E2M1_MAX)), scale


def quantize_fp4(x: Float[Tensor, "*rows I"]) -> tuple[Tensor, Tensor]:
    """Quantise along the last axis.

    Returns:
        int8 bytes [..., I/2] with two codes each, and float8_e8m0fnu scales [..., I/32].

    Raises:
        InputError: I is not a multiple of 32, or x holds NaN or infinite values.
    """
    check_finite(x)
    codes, scale = _scaled_codes(x)
    codes = codes.flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), encode_ue8m0(scale.squeeze(-1))


def unpack_fp4(packed: Tensor) -> Float[Tensor, "*rows I"]:
    """Return the unscaled float32 values of packed bytes, twice as many columns."""
    codes = packed.view(torch.uint8)
    return _decode(torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2))


def dequantize_fp4(packed: Tensor, scale: Tensor) -> Float[Tensor, "*rows I"]:
    """Return the float32 values that packed bytes and their scales stand for."""
    blocks = unpack_fp4(packed).unflatten(-1, (-1, FP4_BLOCK))
    return (blocks * decode_ue8m0(scale).unsqueeze(-1)).flatten(-2)


def round_trip_fp4(x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows I"]:
    """Cast to FP4 and back along the last axis."""
    codes, scale = _scaled_codes(x)
    return (_decode(codes) * scale).flatten(-2).to(x.dtype)


def fake_quantize_fp4(weight_OI: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """Round a matrix through FP4; the gradient passes straight through (report: FP4 QAT)."""
    return straight_through(weight_OI, round_trip_fp4(weight_OI.detach()))


def fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Convert an FP4 matrix to E4M3 with 128x128 blocks, as the published converter does.

    A block's new scale is its largest old one over 2^6, so 6 becomes at most 384. Exact as long as
    the old scales of a block span no more than E4M3's exponents; the published weights do.

    Returns:
        float8_e4m3fn [O, I] and float8_e8m0fnu scales [ceil(O/128), ceil(I/128)].

    Raises:
        InputError: Some value would change.
    """
    old = decode_ue8m0(scale).repeat_interleave(FP4_BLOCK, dim=1)
    out_features, in_features = old.shape
    padded = torch.nn.functional.pad(old, (0, -in_features % 128, 0, -out_features % 128))
    new = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax(dim=(1, 3)) / 64.0
    new = new.clamp_min(2.0**-127)  # of tiles that are all but zero
    spread = new.repeat_interleave(128, 0)[:out_features]
    spread = spread.repeat_interleave(128, 1)[:, :in_features]
    exact = unpack_fp4(packed) * (old / spread)
    cast = exact.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if not torch.equal(cast.float(), exact):
        raise InputError(
            f"FP4 to FP8 loses {int((cast.float() != exact).sum())} of {exact.numel()} values",
            hint="the scales within a 128x128 block lie too far apart",
        )
    return cast, encode_ue8m0(new)

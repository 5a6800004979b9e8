"""Power-of-two scales in UE8M0: one byte b stands for 2^(b - 127); no sign, no mantissa."""

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.errors import InputError

__all__ = ["check_finite", "decode_ue8m0", "encode_ue8m0", "power_of_two_scale"]

_BIAS = 127


def check_finite(weight: Float[Tensor, "..."]) -> None:
    """Refuse weights that no quantised format can hold.

    Raises:
        InputError: NaN or infinite values.
    """
    if not bool(torch.isfinite(weight).all()):
        raise InputError("cannot quantise a weight that holds NaN or infinite values")


def power_of_two_scale(amax: Float[Tensor, "..."], largest: float) -> Float[Tensor, "..."]:
    """Return the smallest power of two `s` with `amax / s <= largest`, in float32.

    Computed on the exponent bits, never through a logarithm, whose rounding would pick the
    neighbour at exact powers. Clamped to what UE8M0 can hold.
    """
    mantissa, exponent = torch.frexp(amax.float() / largest)  # value = mantissa * 2^exponent
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-_BIAS, 127))


def encode_ue8m0(scale: Float[Tensor, "..."]) -> Tensor:
    """Store exact powers of two as float8_e8m0fnu.

    Raises:
        InputError: A scale is no power of two from 2^-127 to 2^127.
    """
    mantissa, exponent = torch.frexp(scale.float())
    stored = exponent - 1 + _BIAS
    if not bool(((mantissa == 0.5) & (stored >= 0) & (stored <= 2 * _BIAS)).all()):
        raise InputError(
            "UE8M0 scales: expected powers of two from 2^-127 to 2^127, got values from "
            f"{scale.min().item()} to {scale.max().item()}"
        )
    return stored.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_ue8m0(stored: Tensor) -> Float[Tensor, "..."]:
    """Read float8_e8m0fnu (or its raw bytes) as float32; also takes float32 scales unchanged.

    Raises:
        InputError: Another dtype, whose bytes are no exponents (spec T10a).
    """
    if stored.dtype == torch.float32:  # Base checkpoints (spec 1.2)
        return stored
    if stored.dtype not in (torch.float8_e8m0fnu, torch.uint8):
        raise InputError(f"scales: expected float8_e8m0fnu or float32, got {stored.dtype}")
    exponent = stored.view(torch.uint8).to(torch.int32) - _BIAS
    ones = torch.ones(exponent.shape, dtype=torch.float32, device=stored.device)
    return torch.ldexp(ones, exponent)

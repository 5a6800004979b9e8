"""Power-of-two scales in UE8M0: one byte b stands for 2^(b - 127); no sign, no mantissa."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["decode_ue8m0", "encode_ue8m0", "power_of_two_scale"]

_BIAS = 127


def power_of_two_scale(amax: Float[Tensor, "..."], largest: float) -> Float[Tensor, "..."]:
    """Return the smallest power of two `s` with `amax / s <= largest`, in float32.

    Computed on the exponent bits, never through a logarithm, whose rounding would pick the
    neighbour at exact powers. Clamped to what UE8M0 can hold.
    """
    mantissa, exponent = torch.frexp(amax.float() / largest)  # value = mantissa * 2^exponent
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-_BIAS, 127))


def encode_ue8m0(scale: Float[Tensor, "..."]) -> Tensor:
    """Store exact powers of two as float8_e8m0fnu."""
    _, exponent = torch.frexp(scale.float())
    return (exponent - 1 + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_ue8m0(stored: Tensor) -> Float[Tensor, "..."]:
    """Read float8_e8m0fnu (or its raw bytes) as float32; also takes float32 scales unchanged."""
    if stored.dtype == torch.float32:  # Base checkpoints (spec 1.2)
        return stored
    exponent = stored.view(torch.uint8).to(torch.int32) - _BIAS
    return torch.ldexp(torch.ones(exponent.shape, device=stored.device), exponent)

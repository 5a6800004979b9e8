"""Partial, interleaved rotary embedding with YaRN (spec/model.md 2.4).

The LAST `R` channels of a vector are rotated, in adjacent pairs. A layer without compression uses
`rope_theta` and no scaling; one with compression uses `compress_rope_theta` and YaRN for all it
rotates: queries, window keys, entries, indexer, and the inverse on its output. There is no
amplitude factor.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.config import LayerKind, ModelConfig, YarnScaling
from hadal.model.kernels.vectors import native_vectors

__all__ = ["Rotation", "inverse_frequencies", "rotate", "rotation"]

Rotation = tuple[Tensor, Tensor]
"""cos and sin, float32, [T, R/2]."""


@lru_cache(maxsize=64)
def inverse_frequencies(rope_dim: int, theta: float, yarn: YarnScaling | None) -> Tensor:
    """Return the R/2 angular frequencies, float32 on the CPU.

    With YaRN, frequencies that turn fewer than `beta_slow` times over the original context are
    divided by `factor`, those above `beta_fast` turns are kept, with a linear ramp between.
    """
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu") / rope_dim
    frequencies = 1.0 / theta**exponents
    if yarn is None:
        return frequencies

    def pair_that_turns(turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return rope_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), rope_dim - 1)
    pairs = torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / yarn.factor * ramp


def rotation(config: ModelConfig, kind: LayerKind, positions_T: Int[Tensor, " T"]) -> Rotation:
    """Return cos and sin of every position for a layer of this kind.

    The angle is a float32 product, as in the published code: near a million tokens float64 would
    give visibly other angles (spec 8.1).
    """
    compressed = kind is not LayerKind.SWA
    frequencies = inverse_frequencies(
        config.qk_rope_head_dim,
        config.compress_rope_theta if compressed else config.rope_theta,
        config.rope_scaling if compressed else None,
    ).to(positions_T.device)
    angles = positions_T.float().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "T *heads K"], rotation: Rotation, *, inverse: bool = False
) -> Float[Tensor, "T *heads K"]:
    """Rotate the last R channels of every vector by its token's angles, or back."""
    found = native_vectors(x, rotation=rotation, inverse=inverse)
    if found is not None:
        return found
    cos, sin = rotation
    if inverse:
        sin = -sin
    if x.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rope_dim = 2 * cos.shape[-1]
    plain, rotated = x[..., : x.shape[-1] - rope_dim], x[..., x.shape[-1] - rope_dim :]
    even, odd = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)

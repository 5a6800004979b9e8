"""Manifold-constrained hyper-connections: four residual streams (report 2.2, spec/model.md 2.2).

Each sub-layer reads one mixture of the streams (`read`), and its output is written back to all of
them while they are mixed by a doubly stochastic matrix (`write`). Shape letters: T tokens,
M streams, D model width, N = (2 + M) M mixing logits.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.config import ModelConfig
from hadal.model.elementwise import sigmoid, softmax
from hadal.model.product import float32_products, product

__all__ = [
    "Mixture",
    "collapse",
    "head_shapes",
    "mixture",
    "read",
    "sinkhorn",
    "site_shapes",
    "write",
]


@dataclass(frozen=True)
class Mixture:
    """Coefficients of one site: A, C and B^T of the report."""

    pre_TM: Tensor
    post_TM: Tensor
    comb_TMM: Tensor
    """Row j, column k: how much of old stream j goes into new stream k."""


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a site: dynamic part, static part, and three scales."""
    streams = config.hc_mult
    mixing = (2 + streams) * streams
    return {"fn": (mixing, streams * config.hidden_size), "base": (mixing,), "scale": (3,)}


def head_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a collapse."""
    streams = config.hc_mult
    return {"fn": (streams, streams * config.hidden_size), "base": (streams,), "scale": (1,)}


def sinkhorn(logits_TMM: Float[Tensor, "T M M"], iterations: int, eps: float) -> Tensor:
    """Make matrices nearly doubly stochastic by alternating row and column normalisation.

    The last step normalises columns: each new stream's weights sum to 1, rows only nearly.
    """
    matrix = softmax(logits_TMM, dim=-1) + eps
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    return matrix


def _logits(streams_TMD: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Return `fn` times the RMS-normalised flattened streams, in float32.

    The norm has no weight, so dividing after the product is exact and cheaper.
    """
    flat = streams_TMD.flatten(1).float()
    with float32_products(flat.device):
        return product(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def mixture(
    streams_TMD: Float[Tensor, "T M D"],
    fn_NX: Float[Tensor, "N X"],
    base_N: Float[Tensor, " N"],
    scale_3: Float[Tensor, "3"],
    config: ModelConfig,
) -> Mixture:
    """Return the coefficients of a site; `fn` makes the dynamic part, `base` is the static one."""
    m = config.hc_mult
    logits = _logits(streams_TMD, fn_NX, config.rms_norm_eps)
    pre, post, comb = logits.split((m, m, m * m), dim=-1)
    pre_base, post_base, comb_base = base_N.split((m, m, m * m))
    comb_logits = (comb * scale_3[2] + comb_base).unflatten(-1, (m, m))
    return Mixture(
        pre_TM=sigmoid(pre * scale_3[0] + pre_base) + config.hc_eps,
        post_TM=2 * sigmoid(post * scale_3[1] + post_base),
        comb_TMM=sinkhorn(comb_logits, config.hc_sinkhorn_iters, config.hc_eps),
    )


def read(streams_TMD: Float[Tensor, "T M D"], mix: Mixture) -> Float[Tensor, "T D"]:
    """Return the input of the sub-layer, `sum_j pre_j X_j`, summed in float32."""
    return (mix.pre_TM.unsqueeze(-1) * streams_TMD).sum(dim=1).to(streams_TMD.dtype)


def write(
    streams_TMD: Float[Tensor, "T M D"],
    output_TD: Float[Tensor, "T D"],
    mix: Mixture,
    *,
    in_float32: bool,
) -> Float[Tensor, "T M D"]:
    """Return the new streams, `X'_k = post_k y + sum_j comb[j, k] X_j` (spec T5: first index)."""
    work = torch.float32 if in_float32 else streams_TMD.dtype
    comb_TMM, old_TMD, y_TD = (t.to(work) for t in (mix.comb_TMM, streams_TMD, output_TD))
    new = [
        mix.post_TM[:, k, None].to(work) * y_TD + (comb_TMM[:, :, k, None] * old_TMD).sum(dim=1)
        for k in range(old_TMD.shape[1])
    ]
    return torch.stack(new, dim=1).to(streams_TMD.dtype)


def collapse(
    streams_TMD: Float[Tensor, "T M D"],
    fn_MX: Float[Tensor, "M X"],
    base_M: Float[Tensor, " M"],
    scale_1: Float[Tensor, "1"],
    config: ModelConfig,
) -> Float[Tensor, "T D"]:
    """Return the one stream that the final norm and the head see."""
    logits = _logits(streams_TMD, fn_MX, config.rms_norm_eps)
    weights = sigmoid(logits * scale_1 + base_M) + config.hc_eps
    return (weights.unsqueeze(-1) * streams_TMD.float()).sum(dim=1).to(streams_TMD.dtype)

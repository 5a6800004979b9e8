"""The parts of a layer in which a token needs no other, each in one call: native/layer.h."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.model.kernels.native import call

__all__ = ["Sizes", "attention_output", "feed_forward", "project"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention layer.

    Attributes:
        kind: 0 window only, 1 with a compressor, 2 with an indexer as well.
        latent: R, of the query latent.
        heads: H.
        head_dim: K.
        compressed: Columns of a compressor's projections.
        index_heads: I.
        index_dim: Columns of an index query.
        index_compressed: As `compressed`, of the indexer's.
    """

    kind: int
    latent: int
    heads: int
    head_dim: int
    compressed: int
    index_heads: int
    index_dim: int
    index_compressed: int


def project(
    x_TD: Float[Tensor, "T D"], positions_T: Int[Tensor, " T"], rotation: tuple[Tensor, Tensor],
    table: Tensor, sizes: Sizes, *, eps: float, index_scale: float, rounds: bool, as_kept: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Return everything that a token needs no other token for, by name, as `Attention` projects it.

    Args:
        x_TD: float32 or bfloat16.
        positions_T: Of the tokens.
        rotation: Cosines and sines of these.
        table: Of the matrices.
        sizes: Of what they make.
        eps: Of the norms.
        index_scale: Of the head weights.
        rounds: Whether inputs are rounded to E4M3.
        as_kept: Whether window keys are rounded as the cache keeps them.
    """
    tokens, cos, sin = x_TD.shape[0], *rotation
    latent = x_TD.new_empty((tokens, sizes.latent))
    found = {
        "query": x_TD.new_empty((tokens, sizes.heads, sizes.head_dim)),
        "window": x_TD.new_empty((tokens, sizes.head_dim)),
    }
    if sizes.kind:
        found["kv"] = torch.empty((tokens, sizes.compressed))
        found["gate"] = torch.empty((tokens, sizes.compressed))
    if sizes.kind == 2:
        found["index_query"] = x_TD.new_empty((tokens, sizes.index_heads, sizes.index_dim))
        found["index_weight"] = x_TD.new_empty((tokens, sizes.index_heads))
        found["index_kv"] = torch.empty((tokens, sizes.index_compressed))
        found["index_gate"] = torch.empty((tokens, sizes.index_compressed))
    outputs = [t.data_ptr() for t in found.values()] + [None] * (8 - len(found))
    call(
        "hadal_project", x_TD.data_ptr(), x_TD.dtype == torch.bfloat16, rounds, tokens, positions_T.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1], eps, table.data_ptr(), sizes.heads, sizes.index_heads,
        index_scale, as_kept, sizes.kind, latent.data_ptr(), *outputs,
    )  # fmt: skip
    return found


def attention_output(
    o_THK: Float[Tensor, "T H K"], rotation: tuple[Tensor, Tensor], table: Tensor, *, groups: int, middle: int,
    outer: int, rounds: bool,
) -> Float[Tensor, "T D"]:  # fmt: skip
    """Return what `Attention` makes of the heads' outputs, which are rotated back where they lie.

    Args:
        o_THK: float32 or bfloat16.
        rotation: Cosines and sines of the tokens.
        table: Of the matrices.
        groups: Of heads.
        middle: Columns between the two matrices.
        outer: D.
        rounds: Whether the second one's inputs are rounded to E4M3.
    """
    cos, sin = rotation
    between = o_THK.new_empty((o_THK.shape[0], middle))
    out = o_THK.new_empty((o_THK.shape[0], outer))
    call(
        "hadal_attention_output", o_THK.data_ptr(), o_THK.dtype == torch.bfloat16, rounds, o_THK.shape[0],
        cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1], table.data_ptr(), o_THK.shape[1], groups,
        between.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def feed_forward(
    x_TD: Float[Tensor, "T D"], ids_T: Int[Tensor, " T"], table: Tensor, *, experts: int, active: int,
    factor: float, limit: float, rounds: bool,
) -> Float[Tensor, "T D"]:  # fmt: skip
    """Return what `MoE` does.

    Args:
        x_TD: float32 or bfloat16.
        ids_T: Of the tokens.
        table: Of gate and experts, the shared one last.
        experts: How many those are.
        active: How many a token goes to, the shared one left out.
        factor: Of the weights.
        limit: Of the inputs of SwiGLU.
        rounds: Whether inputs are rounded to E4M3.
    """
    out = torch.empty_like(x_TD)
    call(
        "hadal_feed_forward", x_TD.data_ptr(), x_TD.dtype == torch.bfloat16, rounds, x_TD.shape[0], table.data_ptr(),
        ids_T.data_ptr(), experts, active, factor, limit, out.data_ptr(),
    )  # fmt: skip
    return out

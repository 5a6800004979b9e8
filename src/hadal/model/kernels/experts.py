"""Routing and experts on the processor: native/route.h, native/experts.h."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.model.kernels.native import call, has_kernel
from hadal.model.kernels.products import format_of

__all__ = ["Matrices", "native_experts", "native_routes", "native_swiglu"]

Matrices = Sequence[tuple[Tensor, Tensor | None]]
"""w1, w3 and w2 of an expert, each with its scale if it has one."""


def native_routes(
    x_TD: Float[Tensor, "T D"], gate_ED: Tensor, bias_E: Tensor | None, table_VA: Tensor | None,
    ids_T: Int[Tensor, " T"], active: int, factor: float, *, at: int | None = None,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]] | None:  # fmt: skip
    """Return the experts of each token and their weights, as `Gate` does; None where there is no kernel for that."""
    if not has_kernel(x_TD, gate_ED):
        return None
    x_TD, gate_ED, ids_T = x_TD.contiguous(), gate_ED.contiguous(), ids_T.long()
    tokens, experts = x_TD.shape[0], gate_ED.shape[0]
    routes_TA = ids_T.new_empty((tokens, active))
    weights_TA = torch.empty((tokens, active))
    call(
        "hadal_route", x_TD.data_ptr(), x_TD.dtype == torch.bfloat16, tokens, gate_ED.data_ptr(),
        gate_ED.dtype == torch.bfloat16, x_TD.shape[1], experts, None if bias_E is None else bias_E.data_ptr(),
        None if table_VA is None else table_VA.data_ptr(), ids_T.data_ptr(), active, factor, routes_TA.data_ptr(),
        weights_TA.data_ptr(), at=at,
    )  # fmt: skip
    return routes_TA, weights_TA


def native_swiglu(
    gate_TF: Float[Tensor, "T F"], up_TF: Float[Tensor, "T F"], limit: float, weight_T: Tensor | None,
    *, at: int | None = None,
) -> Float[Tensor, "T F"] | None:  # fmt: skip
    """Return what an expert's last matrix is given; None where there is no kernel for that."""
    if not has_kernel(gate_TF, up_TF, weight_T):
        return None
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    weight_T = None if weight_T is None else weight_T.float().contiguous()
    out = torch.empty_like(gate_TF)
    call(
        "hadal_swiglu", gate_TF.data_ptr(), up_TF.data_ptr(), gate_TF.dtype == torch.bfloat16, *gate_TF.shape, limit,
        None if weight_T is None else weight_T.data_ptr(), out.data_ptr(), at=at,
    )  # fmt: skip
    return out


def native_experts(
    x_TD: Float[Tensor, "T D"], routes_TA: Int[Tensor, "T A"], weights_TA: Float[Tensor, "T A"],
    routed: dict[int, Matrices], shared: Matrices, limit: float, *, rounds: bool, at: int | None = None,
) -> Float[Tensor, "T D"] | None:  # fmt: skip
    """Return the weighted sum of each token's experts, in the order of their numbers, and the shared one.

    None where there is no kernel for that.

    Args:
        x_TD: float32 or bfloat16.
        routes_TA: Experts of each token.
        weights_TA: Their weights, float32.
        routed: Those that any token goes to, by number.
        shared: The one that all go to.
        limit: Of the inputs of SwiGLU.
        rounds: Whether the inputs of a matrix are rounded to E4M3.
        at: Which of `native.LEVELS`. Default: the best.
    """
    ordered = [(number, routed[number]) for number in sorted(routed)]
    form, shared_form = (format_of(*matrices[0]) for matrices in (ordered[0][1], shared))
    plain = [w for _, matrices in (*ordered, (0, shared)) for w, scale in matrices if scale is None]
    if form is None or shared_form is None or not has_kernel(x_TD, *plain):
        return None
    numbers: list[int] = []
    for number, matrices in (*ordered, (-1, shared)):
        numbers.append(number)
        for weight, scale in matrices:
            assert weight.is_contiguous()
            numbers += (weight.data_ptr(), 0 if scale is None else scale.data_ptr())
    table = torch.tensor(numbers, dtype=torch.int64)
    x_TD = x_TD.contiguous()
    out = torch.empty_like(x_TD)
    hidden, outer = shared[0][0].shape[0], shared[2][0].shape[0]
    call(
        "hadal_experts", x_TD.data_ptr(), x_TD.dtype == torch.bfloat16, x_TD.shape[0], table.data_ptr(),
        len(ordered) + 1, form, shared_form, x_TD.shape[1], hidden, outer, routes_TA.contiguous().data_ptr(),
        weights_TA.contiguous().data_ptr(), routes_TA.shape[1], limit, rounds, out.data_ptr(), at=at,
    )  # fmt: skip
    return out

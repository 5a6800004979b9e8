"""Routed experts with gradients: fast twin of `MoE._routed`.

The same products and sums in the same order, as one operation for autograd with a gradient of its own: it
keeps one product of each place and makes the rest again, and on a CPU it visits blocks of places that fit
its cache. Shape letters as in `moe`; S places, one for each expert of each token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hadal.model import quant
from hadal.model.linear import Linear

__all__ = ["training_experts"]

_BLOCK = 512
"""Places of a block on a CPU: what is computed for them fits its second-level cache."""


def training_experts(
    matrices: Sequence[tuple[Linear, Linear, Linear]],
    x_TD: Float[Tensor, "T D"],
    routes_TA: Int[Tensor, "T A"],
    weights_TA: Float[Tensor, "T A"],
    *,
    limit: float,
) -> Float[Tensor, "T D"]:
    """Return the weighted sum of each token's routed experts, in float32.

    Args:
        matrices: `w1`, `w2` and `w3` of every expert, as plain floats.
        x_TD: Inputs.
        routes_TA: Experts of each token.
        weights_TA: Their weights.
        limit: At which their inner activations are clamped.
    """
    first, second, third = zip(*matrices, strict=True)
    device, precision = x_TD.device.type, first[0].precision
    expert_S = routes_TA.flatten()
    order_S = expert_S.argsort(stable=True)
    places = _Places(
        order_S=order_S,
        token_S=order_S // routes_TA.shape[1],
        counts=expert_S.bincount(minlength=len(matrices)).tolist(),
        block=_BLOCK if device == "cpu" else None,
        limit=limit,
        fp8=precision.activations_fp8,
    )
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x_TD.dtype
    weights = [torch.cat([linear.weight for linear in alike]) for alike in (first, third, second)]
    if precision.expert_weights_fp4:
        weights = [quant.fake_quantize_fp4(weight) for weight in weights]
    w1, w3, w2 = [w.to(dtype).unflatten(0, (len(matrices), -1)) for w in weights]
    x_TD = (quant.round_trip_activations(x_TD) if places.fp8 else x_TD).to(dtype)
    total_TD = _Experts.apply(x_TD, weights_TA, torch.cat((w1, w3), dim=1), w2, places)
    assert isinstance(total_TD, Tensor)
    return total_TD


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Which token each place has, expert by expert, and how to compute.

    Attributes:
        order_S: Of every place its place among [T, A].
        token_S: Its token.
        counts: Places of each expert.
        block: Places of one expert that are computed together; None for all places of all experts.
        limit: As in `training_experts`.
        fp8: Whether the inputs of products are rounded.
    """

    order_S: Tensor
    token_S: Tensor
    counts: list[int]
    block: int | None
    limit: float
    fp8: bool

    def groups(self) -> Iterator[tuple[slice, slice, list[int]]]:
        """Yield experts, places of theirs that are computed together, and how many each has of those."""
        if self.block is None:
            yield slice(0, len(self.counts)), slice(0, len(self.order_S)), self.counts
            return
        stop = 0
        for expert, count in enumerate(self.counts):
            start, stop = stop, stop + count
            for at in range(start, stop, self.block):
                rows = slice(at, min(at + self.block, stop))
                yield slice(expert, expert + 1), rows, [rows.stop - rows.start]

    def rounded(self, x: Tensor) -> Tensor:
        """Return inputs of a product as it takes them."""
        return quant.round_trip_activations(x) if self.fp8 else x


class _Experts(torch.autograd.Function):
    """The weighted sum; `w13` [E, 2F, D] are gate and up, `w2` [E, D, F] is down."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TA: Tensor, w13: Tensor, w2: Tensor, places: _Places
    ) -> Tensor:
        weight_S1 = weights_TA.flatten()[places.order_S].unsqueeze(1)
        total_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        products: list[Tensor] = []
        for experts, rows, counts in places.groups():
            token = places.token_S[rows]
            both = _by_expert(x_TD.index_select(0, token), w13[experts].mT, counts)
            gate, up = _clamped(both, places.limit)
            inner = F.silu(gate).mul_(up).mul_(weight_S1[rows])
            inner = places.rounded(inner.to(x_TD.dtype))
            total_TD.index_add_(0, token, _by_expert(inner, w2[experts].mT, counts).float())
            products.append(both)
        ctx.places = places
        ctx.save_for_backward(x_TD, weights_TA, w13, w2, *products)
        return total_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TA, w13, w2, *products = ctx.saved_tensors
        places: _Places = ctx.places
        weight_S1 = weights_TA.flatten()[places.order_S].unsqueeze(1)
        grad_x = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        grad_weight_S = torch.empty_like(weight_S1[:, 0])
        grad_w13, grad_w2 = (torch.zeros_like(w, dtype=torch.float32) for w in (w13, w2))
        for (experts, rows, counts), both in zip(places.groups(), products, strict=True):
            token = places.token_S[rows]
            grad = grads[0].index_select(0, token).to(x_TD.dtype)
            grad_inner = _by_expert(grad, w2[experts], counts).float()
            inner, grad_both, grad_weight_S[rows] = _inner_gradient(
                both, grad_inner, weight_S1[rows], places.limit
            )
            inner = places.rounded(inner.to(x_TD.dtype))
            _add_outer(grad_w2[experts], grad, inner, counts)
            _add_outer(grad_w13[experts], grad_both, x_TD.index_select(0, token), counts)
            grad_x.index_add_(0, token, _by_expert(grad_both, w13[experts], counts).float())
        grad_weights = torch.empty_like(weights_TA).flatten()
        grad_weights[places.order_S] = grad_weight_S
        grads_w = grad_w13.to(w13.dtype), grad_w2.to(w2.dtype)
        return grad_x.to(x_TD.dtype), grad_weights.view_as(weights_TA), *grads_w, None


def _clamped(both: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    gate, up = (half.to(torch.float32, copy=True) for half in both.chunk(2, dim=1))
    return gate.clamp_(max=limit), up.clamp_(-limit, limit)


def _inner_gradient(
    both: Tensor, grad: Tensor, weight_S1: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what goes into `w2`, and the gradients of the products before it and of the weights."""
    gate, up = _clamped(both, limit)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    inner = silu * up
    grad_weight_S = (grad * inner).sum(dim=1)
    grad = grad * weight_S1
    slope = (gate - silu).add_(1).mul_(sigmoid)  # of silu
    grad_both = torch.empty_like(both)
    grad_gate, grad_up = grad_both.chunk(2, dim=1)
    of_gate, of_up = both.chunk(2, dim=1)  # nothing passes where they were clamped
    grad_gate.copy_(slope.mul_(grad).mul_(up).mul_(gate == of_gate))
    grad_up.copy_(grad.mul_(silu).mul_(up == of_up))
    return inner.mul_(weight_S1), grad_both, grad_weight_S


def _by_expert(x_SI: Tensor, weights_EIO: Tensor, counts: list[int]) -> Tensor:
    """Multiply the rows of each expert with its matrix."""
    pairs = zip(x_SI.split(counts), weights_EIO.unbind(), strict=True)
    products = [x @ weight for x, weight in pairs]
    return products[0] if len(products) == 1 else torch.cat(products)


def _add_outer(into_EOI: Tensor, grad_SO: Tensor, x_SI: Tensor, counts: list[int]) -> None:
    """Add to the gradient of each expert's matrix."""
    parts = zip(into_EOI.unbind(), grad_SO.split(counts), x_SI.split(counts), strict=True)
    for into, grad, x in parts:
        into += grad.mT @ x

"""Hyper-connections with gradients: fast twins of `mhc.sinkhorn` and `mhc.write`, in float32.

Shape letters as in `mhc`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.model.mhc import Mixture

__all__ = ["training_sinkhorn", "training_write"]


class _Normalized(torch.autograd.Function):
    """Alternating normalisation of columns and rows, with T as the last axis: [M, M, T]."""

    @staticmethod
    def forward(ctx: Any, matrix_MMT: Tensor, iterations: int, eps: float) -> Tensor:
        steps: list[Tensor] = []
        for step in range(2 * iterations - 1):
            total = matrix_MMT.sum(step % 2, keepdim=True) + eps  # columns of sums first
            matrix_MMT = matrix_MMT / total
            steps += [matrix_MMT, total]
        ctx.save_for_backward(*steps)
        return matrix_MMT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_MMT, steps = grads[0], ctx.saved_tensors
        for step in range(len(steps) // 2 - 1, -1, -1):
            # of y = x / (sum x + eps): dx = (dy - sum(y dy)) / (sum x + eps)
            matrix, total = steps[2 * step : 2 * step + 2]
            grad_MMT = (grad_MMT - (grad_MMT * matrix).sum(step % 2, keepdim=True)) / total
        return grad_MMT, None, None


def training_sinkhorn(logits_TMM: Float[Tensor, "T M M"], iterations: int, eps: float) -> Tensor:
    """Return what `mhc.sinkhorn` does."""
    matrix_MMT = (logits_TMM.softmax(dim=-1) + eps).permute(1, 2, 0).contiguous()
    normalized = _Normalized.apply(matrix_MMT, iterations, eps)
    assert isinstance(normalized, Tensor)
    return normalized.permute(2, 0, 1)


def training_write(
    streams_TMD: Float[Tensor, "T M D"], output_TD: Float[Tensor, "T D"], mix: Mixture
) -> Float[Tensor, "T M D"]:
    """Return what `mhc.write` does, as one product for each token."""
    weights = torch.cat((mix.comb_TMM, mix.post_TM.unsqueeze(1)), dim=1)
    values = torch.cat((streams_TMD, output_TD.unsqueeze(1)), dim=1)
    return torch.bmm(weights.transpose(1, 2), values)

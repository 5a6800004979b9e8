"""Hyper-connections with gradients: fast twins of `mhc.mixture` with `mhc.read`, and of `mhc.write`, in float32.

The same sums, with gradients of their own: on a CPU in blocks of tokens that fit its cache. Shape letters as
in `mhc`; B tokens of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.config import ModelConfig
from hadal.model.mhc import Mixture

__all__ = ["training_read", "training_write"]

_BLOCK = 256
"""Tokens of a block on a CPU: their streams fit its second-level cache."""


def training_read(
    streams_TMD: Float[Tensor, "T M D"],
    fn_NX: Float[Tensor, "N X"],
    base_N: Float[Tensor, " N"],
    scale_3: Float[Tensor, "3"],
    config: ModelConfig,
) -> tuple[Float[Tensor, "T D"], Mixture]:
    """Return what `mhc.read` does of `mhc.mixture`, and that; `pre_TM` of it has no gradient."""
    streams_TMD = streams_TMD.float()
    m = config.hc_mult
    settings = (config.rms_norm_eps, config.hc_eps, _block(streams_TMD))
    pre_base, post_base, comb_base = base_N.split((m, m, m * m))
    with torch.autocast(streams_TMD.device.type, enabled=False):
        x_TD, pre_TM, logits = _Read.apply(streams_TMD, fn_NX, pre_base, scale_3[0], *settings)
    post, comb = logits.split((m, m * m), dim=-1)
    comb_logits = (comb * scale_3[2] + comb_base).unflatten(-1, (m, m))
    mix = Mixture(
        pre_TM=pre_TM,
        post_TM=2 * torch.sigmoid(post * scale_3[1] + post_base),
        comb_TMM=_sinkhorn(comb_logits, config.hc_sinkhorn_iters, config.hc_eps, settings[-1]),
    )
    return x_TD, mix


def training_write(
    streams_TMD: Float[Tensor, "T M D"], output_TD: Float[Tensor, "T D"], mix: Mixture
) -> Float[Tensor, "T M D"]:
    """Return what `mhc.write` does."""
    block = _block(streams_TMD)
    with torch.autocast(streams_TMD.device.type, enabled=False):
        new_TMD = _Write.apply(
            streams_TMD.float(), output_TD.float(), mix.comb_TMM, mix.post_TM, block
        )
    assert isinstance(new_TMD, Tensor)
    return new_TMD


def _block(streams_TMD: Tensor) -> int:
    return _BLOCK if streams_TMD.device.type == "cpu" else max(1, streams_TMD.shape[0])


def _blocks(num_tokens: int, block: int) -> Iterator[slice]:
    return (slice(at, min(at + block, num_tokens)) for at in range(0, num_tokens, block))


def _sinkhorn(logits_TMM: Tensor, iterations: int, eps: float, block: int) -> Tensor:
    """Return what `mhc.sinkhorn` does."""
    matrices_TMM = logits_TMM.softmax(dim=-1) + eps
    parts = [
        _Normalized.apply(part.permute(1, 2, 0).contiguous(), iterations, eps).permute(2, 0, 1)
        for part in matrices_TMM.split(4 * block)
    ]
    return torch.cat(parts) if parts else matrices_TMM


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
        grad_MMT, steps = grads[0].contiguous(), ctx.saved_tensors
        for step in range(len(steps) // 2 - 1, -1, -1):
            # of y = x / (sum x + eps): dx = (dy - sum(y dy)) / (sum x + eps)
            matrix, total = steps[2 * step : 2 * step + 2]
            grad_MMT = (grad_MMT - (grad_MMT * matrix).sum(step % 2, keepdim=True)).div_(total)
        return grad_MMT, None, None


class _Read(torch.autograd.Function):
    """The input of a sub-layer, the weights of the streams in it, and the logits of the rest."""

    @staticmethod
    def forward(
        ctx: Any, streams_TMD: Tensor, fn_NX: Tensor, base_M: Tensor, scale: Tensor,
        norm_eps: float, eps: float, block: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        num_tokens, m, _ = streams_TMD.shape
        flat_TX = streams_TMD.flatten(1)
        x_TD = torch.empty_like(streams_TMD[:, 0])
        raw_TN = flat_TX.new_empty(num_tokens, fn_NX.shape[0])
        inverse_T1 = flat_TX.new_empty(num_tokens, 1)
        sigmoid_TM = flat_TX.new_empty(num_tokens, m)
        for rows in _blocks(num_tokens, block):
            flat = flat_TX[rows]
            mean = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_().div_(flat.shape[1])
            inverse_T1[rows] = mean.add_(norm_eps).rsqrt_()
            torch.mm(flat, fn_NX.T, out=raw_TN[rows])
            pre = raw_TN[rows, :m] * inverse_T1[rows]
            sigmoid_TM[rows] = pre.mul_(scale).add_(base_M).sigmoid_()
            weights = (sigmoid_TM[rows] + eps).unsqueeze(1)
            torch.bmm(weights, streams_TMD[rows], out=x_TD[rows].unsqueeze(1))
        ctx.settings = (eps, block)
        ctx.save_for_backward(streams_TMD, fn_NX, scale, raw_TN, inverse_T1, sigmoid_TM)
        pre_TM = sigmoid_TM + eps
        ctx.mark_non_differentiable(pre_TM)
        return x_TD, pre_TM, raw_TN[:, m:] * inverse_T1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        eps, block = ctx.settings
        streams_TMD, fn_NX, scale, raw_TN, inverse_T1, sigmoid_TM = ctx.saved_tensors
        grad_x_TD, _, grad_rest = grads
        num_tokens, m, width = streams_TMD.shape
        grad_streams, grad_fn = torch.empty_like(streams_TMD), torch.zeros_like(fn_NX)
        slope_TM = sigmoid_TM * (1 - sigmoid_TM)
        grad_pre_TM = torch.empty_like(sigmoid_TM)
        for rows in _blocks(num_tokens, block):
            streams, grad_x, inverse = streams_TMD[rows], grad_x_TD[rows], inverse_T1[rows]
            flat = streams.flatten(1)
            grad_pre_TM[rows] = (streams * grad_x.unsqueeze(1)).sum(dim=2) * slope_TM[rows]
            grad_logits = torch.cat((grad_pre_TM[rows] * scale, grad_rest[rows]), dim=1)
            # of r = (mean x^2 + eps)^(-1/2): dr = - r^3 x / X
            of_inverse = (grad_logits * raw_TN[rows]).sum(dim=1, keepdim=True)
            of_flat = of_inverse.mul_(inverse.pow(3)).div_(-m * width)
            grad_raw = grad_logits.mul_(inverse)
            grad_fn.addmm_(grad_raw.T, flat)
            grad_flat = torch.addmm(flat * of_flat, grad_raw, fn_NX)
            weights = (sigmoid_TM[rows] + eps).unsqueeze(2)
            torch.baddbmm(
                grad_flat.view_as(streams), weights, grad_x.unsqueeze(1), out=grad_streams[rows]
            )
        grad_scale = (grad_pre_TM * raw_TN[:, :m] * inverse_T1).sum()
        return grad_streams, grad_fn, grad_pre_TM.sum(dim=0), grad_scale, None, None, None


class _Write(torch.autograd.Function):
    """The new streams."""

    @staticmethod
    def forward(
        ctx: Any, streams_TMD: Tensor, output_TD: Tensor, comb_TMM: Tensor, post_TM: Tensor,
        block: int,
    ) -> Tensor:  # fmt: skip
        new_TMD = torch.empty_like(streams_TMD)
        for rows in _blocks(streams_TMD.shape[0], block):
            own = torch.bmm(post_TM[rows].unsqueeze(2), output_TD[rows].unsqueeze(1))
            torch.baddbmm(own, comb_TMM[rows].mT, streams_TMD[rows], out=new_TMD[rows])
        ctx.block = block
        ctx.save_for_backward(streams_TMD, output_TD, comb_TMM, post_TM)
        return new_TMD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams_TMD, output_TD, comb_TMM, post_TM = ctx.saved_tensors
        grad_TMD = grads[0].contiguous()
        grad_streams, grad_output = torch.empty_like(streams_TMD), torch.empty_like(output_TD)
        grad_comb, grad_post = torch.empty_like(comb_TMM), torch.empty_like(post_TM)
        for rows in _blocks(streams_TMD.shape[0], ctx.block):
            grad = grad_TMD[rows]
            torch.bmm(comb_TMM[rows], grad, out=grad_streams[rows])
            torch.bmm(streams_TMD[rows], grad.mT, out=grad_comb[rows])
            grad_post[rows] = (grad * output_TD[rows].unsqueeze(1)).sum(dim=2)
            torch.bmm(post_TM[rows].unsqueeze(1), grad, out=grad_output[rows].unsqueeze(1))
        return grad_streams, grad_output, grad_comb, grad_post, None

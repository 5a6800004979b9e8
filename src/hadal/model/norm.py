"""RMS normalisation, with a weight and without (spec/model.md 2.3)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hadal.model.kernels.vectors import native_vectors

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x: Float[Tensor, "*rows D"], eps: float) -> Float[Tensor, "*rows D"]:
    """Divide by the root mean square of the last axis, in float32, and cast back."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a weight, which is stored in the dtype of the model and applied in float32."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Normalise the last axis."""
        y = native_vectors(x, norm=self.eps, weight=self.weight)
        if y is not None:
            return y
        return (rms_norm(x.float(), self.eps) * self.weight.float()).to(x.dtype)

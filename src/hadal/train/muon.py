"""Muon for matrices, AdamW for everything else (report; spec/model.md 7.1)."""

# torch has its operations on lists of tensors under these names only, and documents them.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hadal.model import Transformer
from hadal.train.product_dtype import product_dtype

__all__ = ["Muon", "newton_schulz", "split_parameters"]

_STEPS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
_UPDATE_RMS = 0.18


def newton_schulz(matrices_BNM: Float[Tensor, "B N M"]) -> Float[Tensor, "B N M"]:
    """Return matrices with the same singular vectors and singular values near 1, in `product_dtype`.

    Eight steps that converge fast and two that converge to 1 (report, algorithm 1).
    """
    wide = matrices_BNM.shape[1] <= matrices_BNM.shape[2]
    x = (matrices_BNM if wide else matrices_BNM.mT).to(product_dtype(matrices_BNM.device))
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-30).to(x.dtype)
    for a, b, c in _STEPS:
        square = x @ x.mT
        mixed = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; the RMS of an update is 0.18 times the rate.

    Matrices of the same shape are one batch.

    Args:
        parameters: Matrices, each a logical unit of its own.
        lr: Learning rate; with this scaling the rates of AdamW fit.
        momentum: Of the gradients.
        weight_decay: Per unit of learning rate.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in alike.items():
                self._step_alike(group, shape, parameters)

    def _step_alike(
        self, group: dict[str, Any], shape: tuple[int, ...], parameters: list[nn.Parameter]
    ) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta: list[Tensor] = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=group["momentum"])
        updates = newton_schulz(torch.stack(ahead)).float() * (max(shape) ** 0.5 * _UPDATE_RMS)
        weights: list[Tensor] = [*parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, [*updates.unbind()], alpha=group["lr"])


def split_parameters(model: Transformer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what Muon trains and what AdamW trains.

    AdamW has embedding, head, norms, the static parts and scales of mHC (report), and what is no matrix
    of weights: positional biases and sinks. Routing biases have no gradient and are in neither.
    """
    muon: list[nn.Parameter] = []
    adamw: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        is_matrix = parameter.ndim == 2 and leaf != "ape"
        (muon if is_matrix and not name.startswith(("embed", "head")) else adamw).append(parameter)
    return muon, adamw

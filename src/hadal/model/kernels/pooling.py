"""Windows of tokens to entries: native/entry.h."""

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.model.kernels.native import call, has_kernel

__all__ = ["native_pool"]


def native_pool(
    kv_NP: Float[Tensor, "N Kp"], gate_NP: Float[Tensor, "N Kp"],
    before: tuple[Tensor, Tensor] | None, rate: int, *, at: int | None = None,
) -> Float[Tensor, "C K"] | None:  # fmt: skip
    """Return the entries of whole windows; None where there is no kernel for that.

    Args:
        kv_NP: Keys, float32, `rate` rows for each window.
        gate_NP: Their logits.
        before: Both of the window before the first, [rate, K], where windows overlap.
        rate: Tokens of a window.
        at: Which of `native.LEVELS`. Default: the best.
    """
    if not has_kernel(kv_NP, gate_NP) or kv_NP.dtype != torch.float32:
        return None
    kv_NP, gate_NP = kv_NP.contiguous(), gate_NP.contiguous()
    before_kv, before_gate = (t.contiguous() for t in before) if before else (None, None)
    width = kv_NP.shape[1] if before_kv is None else kv_NP.shape[1] // 2
    out = kv_NP.new_empty((kv_NP.shape[0] // rate, width))
    call(
        "hadal_pool", kv_NP.data_ptr(), gate_NP.data_ptr(), None if before_kv is None else before_kv.data_ptr(),
        None if before_gate is None else before_gate.data_ptr(), rate, width, out.shape[0], out.data_ptr(), at=at,
    )  # fmt: skip
    return out

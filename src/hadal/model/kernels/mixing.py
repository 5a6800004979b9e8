"""Hyper-connections on the processor: native/mhc.h."""

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.config import ModelConfig
from hadal.model.kernels.native import call, has_kernel

__all__ = ["MOST_STREAMS", "mhc_read", "mhc_write"]

MOST_STREAMS = 16
"""Of the kernel."""


def mhc_read(
    streams_TMD: Float[Tensor, "T M D"], fn_NX: Tensor, base_N: Tensor, scale_3: Tensor, config: ModelConfig,
    *, norm: Tensor | None = None, at: int | None = None,
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T N"]] | None:  # fmt: skip
    """Return the input of a sub-layer and the coefficients of its site, as `mhc.read` and `mhc.mixture` do.

    None where there is no kernel for that.

    Args:
        streams_TMD: float32 or bfloat16.
        fn_NX: The dynamic part of the site, float32, as
        base_N: its static part and
        scale_3: its scales.
        config: Of the model.
        norm: Weight of an RMS norm of the input, in the dtype of the streams.
        at: Which of `native.LEVELS`. Default: the best.
    """
    rows, streams, width = streams_TMD.shape
    if streams > MOST_STREAMS or not has_kernel(streams_TMD, fn_NX, norm):
        return None
    given = streams_TMD.contiguous()
    mix = torch.empty((rows, fn_NX.shape[0]))
    out = given.new_empty((rows, width))
    call(
        "hadal_mhc_read", given.data_ptr(), given.dtype == torch.bfloat16, rows, streams, width, fn_NX.data_ptr(), base_N.data_ptr(),
        scale_3.data_ptr(), config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps,
        None if norm is None else norm.data_ptr(), mix.data_ptr(),
        out.data_ptr(), at=at,
    )  # fmt: skip
    return out, mix


def mhc_write(
    streams_TMD: Float[Tensor, "T M D"], output_TD: Float[Tensor, "T D"], mix_TN: Float[Tensor, "T N"],
    *, at: int | None = None,
) -> Float[Tensor, "T M D"]:  # fmt: skip
    """Return the new streams, as `mhc.write` does in float32, with what `mhc_read` has returned."""
    rows, streams, width = streams_TMD.shape
    given, output = streams_TMD.contiguous(), output_TD.contiguous()
    out = torch.empty_like(given)
    call(
        "hadal_mhc_write", given.data_ptr(), output.data_ptr(), given.dtype == torch.bfloat16, rows, streams, width, mix_TN.data_ptr(),
        out.data_ptr(), at=at,
    )  # fmt: skip
    return out

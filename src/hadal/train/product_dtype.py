"""In which numbers training multiplies: BF16 where a device does so itself."""

import torch

__all__ = ["product_dtype"]


def product_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 on a processor that would only emulate it: at a hundredth of the speed (dev/LOG.md)."""
    if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32

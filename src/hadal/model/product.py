"""Matrix products whose rows do not depend on how many rows there are.

BLAS takes another path for a handful of rows, with another order of summation, so a token decoded
alone would differ in its last bits from the same token in a prefill. Those bits decide near-ties of
the indexer and the router, where a flip changes a logit by 0.5 (dev/LOG.md). Rows and
columns (the indexer's keys grow) are therefore padded to a minimum, which costs nothing next to
reading the matrix.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hadal.model.kernels.products import native_product

__all__ = ["float32_products", "product"]

_MIN_ROWS = 16
"""Measured: from 8 rows on, every row of a float32 product is the same bits in any batch."""


def product(x: Float[Tensor, "T I"], weight_OI: Float[Tensor, "O I"]) -> Float[Tensor, "T O"]:
    """Return `x W^T` in the dtype of x."""
    y = native_product(x, weight_OI)
    if y is not None:
        return y
    weight_OI = weight_OI.to(x.dtype)
    num_rows, num_columns = x.shape[0], weight_OI.shape[0]
    return F.linear(_padded(x), _padded(weight_OI))[:num_rows, :num_columns]


def float32_products(device: torch.device) -> AbstractContextManager[object]:
    """Return where products of float32 stay float32, also in a training whose other products are halved (spec 2.7, 3.2)."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _padded(rows: Tensor) -> Tensor:
    missing = _MIN_ROWS - rows.shape[0]
    return rows if missing <= 0 else F.pad(rows, (0, 0, 0, missing))

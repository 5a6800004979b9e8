"""Attention and its indexer on the processor, over rows of the cache where they lie: native/attend.h, native/choose.h."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.model.kernels.native import LANES, call, has_kernel

__all__ = ["PACKINGS", "Pages", "native_attention", "native_choice"]

PACKINGS = ("float32", "bfloat16", "kv", "index")
"""What a row of a page holds, as the library numbers it."""


@dataclass(frozen=True)
class Pages:
    """Rows of a cache where they lie.

    Attributes:
        memory: [N, P, W] pages of rows.
        table: int64, which page holds the rows n P, n P + 1, ...
        packing: One of `PACKINGS`.
    """

    memory: Tensor
    table: Tensor
    packing: str

    def arguments(self) -> tuple[int, int, int, int, int]:
        """Return what the library takes of it."""
        row_bytes = self.memory.shape[-1] * self.memory.element_size()
        kind = PACKINGS.index(self.packing)
        return self.memory.data_ptr(), self.table.data_ptr(), self.memory.shape[1], row_bytes, kind


_NO_PAGES = (None, None, 1, 1, 0)


def native_attention(
    q_THK: Float[Tensor, "T H K"], window_PK: Float[Tensor, "P K"], window: int, pages: Pages | None,
    visible_T: Int[Tensor, " T"], index_TS: Int[Tensor, "T S"] | None, sink_H: Tensor, rotated: int,
    *, at: int | None = None,
) -> Float[Tensor, "T H K"] | None:  # fmt: skip
    """Return what `core_attention` does; None where there is no kernel for that.

    Args:
        q_THK: float32 or bfloat16.
        window_PK: Keys up to the last query's own, in the dtype of q.
        window: Keys that a query sees, itself included.
        pages: Compressed entries; None in a layer without.
        visible_T: How many of them each query may see.
        index_TS: Which of those it does see, ascending, as many as it may see; None for all.
        sink_H: float32.
        rotated: Columns of an entry that are rotated.
        at: Which of `native.LEVELS`. Default: the best.
    """
    tokens, heads, width = q_THK.shape
    if width % LANES or not has_kernel(q_THK, window_PK, sink_H):
        return None
    q_THK, window_PK, visible_T = q_THK.contiguous(), window_PK.contiguous(), visible_T.contiguous()
    index_TS = None if index_TS is None else index_TS.contiguous()
    out = torch.empty_like(q_THK)
    call(
        "hadal_attend", q_THK.data_ptr(), out.data_ptr(), q_THK.dtype == torch.bfloat16, tokens, heads, width,
        window_PK.data_ptr(), window_PK.shape[0] - tokens, window, *(_NO_PAGES if pages is None else pages.arguments()),
        rotated, visible_T.data_ptr(), None if index_TS is None else index_TS.data_ptr(),
        0 if index_TS is None else index_TS.shape[1], sink_H.data_ptr(), at=at,
    )  # fmt: skip
    return out


def native_choice(
    query_TIK: Float[Tensor, "T I K"], weight_TI: Float[Tensor, "T I"], pages: Pages, count: int,
    visible_T: Int[Tensor, " T"], top_k: int, *, in_bfloat16: bool, at: int | None = None,
) -> Int[Tensor, "T S"] | None:  # fmt: skip
    """Return the best entries of each query, as `selection.Selection` has them; None where there is no kernel for that.

    Args:
        query_TIK: float32 or bfloat16.
        weight_TI: The same.
        pages: Index keys.
        count: How many there are.
        visible_T: How many of them each query may see, ascending.
        top_k: How many to choose.
        in_bfloat16: Round as `indexer.index_scores` does.
        at: Which of `native.LEVELS`. Default: the best.
    """
    if weight_TI.dtype != query_TIK.dtype or not has_kernel(query_TIK, weight_TI):
        return None
    query_TIK, weight_TI = query_TIK.contiguous(), weight_TI.contiguous()
    tokens, heads, width = query_TIK.shape
    index_TS = visible_T.new_empty((tokens, min(top_k, count)))
    call(
        "hadal_choose", query_TIK.data_ptr(), weight_TI.data_ptr(), query_TIK.dtype == torch.bfloat16, tokens, heads,
        width, *pages.arguments(), visible_T.contiguous().data_ptr(), top_k, index_TS.shape[1], in_bfloat16,
        index_TS.data_ptr(), at=at,
    )  # fmt: skip
    return index_TS

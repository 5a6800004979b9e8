"""Top-k with a defined order of ties (spec T1): the lowest index wins, everywhere.

Index scores are exactly zero whenever every head's product is negative, so ties are common with few
heads, and a top-k that breaks them by chance gives other tokens in prefill than in decode.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Selection", "all_visible", "select_top_k", "visible_entries"]


@dataclass(frozen=True)
class Selection:
    """Entries that each query of one sequence attends to.

    Attributes:
        index_TS: Entry indices, ascending where valid.
        valid_TS: False where a query had fewer entries to choose from.
    """

    index_TS: Tensor
    valid_TS: Tensor

    @classmethod
    def joined(cls, parts: "list[Selection]") -> "Selection":
        """Return the selections of consecutive queries as one."""
        return cls(torch.cat([p.index_TS for p in parts]), torch.cat([p.valid_TS for p in parts]))


def all_visible(visible_T: Int[Tensor, " T"], like_TC: Tensor) -> Bool[Tensor, "T C"]:
    """Return which of the entries (columns of `like_TC`) each query may see."""
    return torch.arange(like_TC.shape[1], device=like_TC.device) < visible_T.unsqueeze(1)


def visible_entries(positions_T: Int[Tensor, " T"], rate: int) -> Int[Tensor, " T"]:
    """Return how many entries each position sees: those of windows that end at or before it."""
    return (positions_T + 1) // rate


def select_top_k(
    scores_TC: Float[Tensor, "T C"], visible_T: Int[Tensor, " T"], k: int
) -> Selection:
    """Return the `k` best visible entries of each query; equal scores go to the lowest index.

    Validity comes from `visible_T`, never from the scores, so whatever stands beyond (other
    sequences' values, NaN) can not be chosen (spec T17).
    """
    num_entries = scores_TC.shape[1]
    k = min(k, num_entries)
    hidden = ~all_visible(visible_T, scores_TC)
    scores = scores_TC.masked_fill(hidden, float("-inf"))
    chosen = _k_best(scores, k) & ~hidden
    index_TS = _indices(chosen, k)
    valid_TS = torch.arange(k, device=scores.device) < chosen.sum(1, keepdim=True)
    return Selection(index_TS.masked_fill(~valid_TS, 0), valid_TS)


def _k_best(scores: Tensor, k: int) -> Bool[Tensor, "T C"]:
    """Mark k entries a row: all above the k-th value, then the first of those equal to it."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def _indices(chosen: Bool[Tensor, "T C"], k: int) -> Int[Tensor, "T S"]:
    """Return the positions of the True values of each row in ascending order, padded behind."""
    num_entries = chosen.shape[1]
    order = torch.arange(num_entries, device=chosen.device).expand_as(chosen)
    keys = torch.where(chosen, order, num_entries)
    return keys.topk(k, dim=1, largest=False, sorted=True).values

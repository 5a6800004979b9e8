"""Top-k with a defined order of ties (spec T1): the lowest index wins, everywhere.

Index scores are exactly zero whenever every head's product is negative, so ties are common with few
heads, and a top-k that breaks them by chance gives other tokens in prefill than in decode.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["RunningTopK", "Selection", "all_visible", "select_top_k", "visible_entries"]


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


class RunningTopK:
    """The `k` best visible entries of each query, over scores that arrive block by block.

    Equal scores go to the lowest index. Validity comes from `visible_T`, never from the scores, so
    whatever stands beyond (other sequences' values, NaN) can not be chosen (spec T17).

    Args:
        visible_T: How many entries each query may see.
        k: How many to choose.
    """

    def __init__(self, visible_T: Int[Tensor, " T"], k: int) -> None:
        self._visible_T = visible_T
        self._k = k
        self._best_TS = visible_T.new_zeros((visible_T.shape[0], 0), dtype=torch.int64)
        """Order keys of the best so far: see `_order_keys`."""

    def add(self, scores_TC: Float[Tensor, "T C"], first: int) -> None:
        """Take the scores of entries `first`, `first + 1`, ..."""
        index_C = torch.arange(first, first + scores_TC.shape[1], device=scores_TC.device)
        hidden_TC = index_C >= self._visible_T.unsqueeze(1)
        scores_TC = scores_TC.float().masked_fill(hidden_TC, float("-inf"))
        if self._best_TS.shape[1] == self._k:
            keys_TC = self._contenders(scores_TC, first)
        else:
            keys_TC = _order_keys(scores_TC, index_C)
        candidates = torch.cat((self._best_TS, keys_TC), dim=1)
        count = min(self._k, candidates.shape[1])
        self._best_TS = candidates.topk(count, dim=1, sorted=False).values

    def _contenders(self, scores_TC: Tensor, first: int) -> Int[Tensor, "T M"]:
        """Return the order keys of entries better than the worst chosen so far, few in a long context.

        An equal score does not contend: its index is higher than all before.
        """
        worst_T = _scores_of(self._best_TS.amin(dim=1))
        row, column = (scores_TC > worst_T.unsqueeze(1)).nonzero(as_tuple=True)
        counts_T = torch.bincount(row, minlength=scores_TC.shape[0])
        if not row.shape[0]:
            return self._best_TS[:, :0]
        place = torch.arange(row.shape[0], device=row.device) - (counts_T.cumsum(0) - counts_T)[row]
        keys_TM = self._best_TS.new_full((scores_TC.shape[0], int(counts_T.max())), _NO_ENTRY)
        keys_TM[row, place] = _order_keys(scores_TC[row, column], column + first)
        return keys_TM

    def selection(self) -> Selection:
        """Return the choice; with fewer entries than `k` all of them."""
        index_TS = (_LAST_INDEX - (self._best_TS & _LAST_INDEX)).sort(dim=1).values
        valid_TS = index_TS < self._visible_T.unsqueeze(1)
        return Selection(index_TS.masked_fill(~valid_TS, 0), valid_TS)


def select_top_k(
    scores_TC: Float[Tensor, "T C"], visible_T: Int[Tensor, " T"], k: int
) -> Selection:
    """Return the `k` best visible entries of each query of a whole table of scores."""
    best = RunningTopK(visible_T, k)
    best.add(scores_TC, 0)
    return best.selection()


_LAST_INDEX = 2**31 - 1
_NO_ENTRY = -(2**63)
"""Orders below every entry, so that it is never chosen where there are `k` of them."""


def _order_keys(scores: Float[Tensor, "..."], index: Tensor) -> Int[Tensor, "..."]:
    """Return whole numbers that order as (score, then lowest index first), all different.

    A float's bits order like its value once the negative ones are turned over; adding zero makes
    one zero of the two.
    """
    bits = (scores.float() + 0.0).view(torch.int32)
    return (_turned(bits).long() << 32) | (_LAST_INDEX - index)


def _scores_of(keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the scores that order keys were made of."""
    return _turned((keys >> 32).int()).view(torch.float32)


def _turned(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Turn the negative ones over; doing so twice changes nothing."""
    return bits ^ ((bits >> 31) & _LAST_INDEX)

"""Losses of parts that the language-model loss does not reach (spec/model.md 7.1).

Shape letters: T tokens of one sequence, C entries, S selected entries, E experts, A active ones.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hadal.model.selection import Selection

__all__ = ["balance_loss", "indexer_loss"]


def indexer_loss(
    scores_TC: Float[Tensor, "T C"],
    mass: Float[Tensor, "T CS"],
    visible_T: Int[Tensor, " T"],
    selection: Selection | None,
) -> Float[Tensor, " T1"]:
    """Return KL(target || softmax(scores)) of every query that sees an entry.

    The target is the share of the JOINT softmax (window, entries, sink) that the main attention
    put on each entry, summed over heads, then normalised: heads that look at the window weigh
    little. Renormalising each head over the entries first would be another target (spec T11).

    Args:
        scores_TC: Index scores, the only input that gets a gradient.
        mass: Probability on each entry, or on each selected one, summed over heads.
        visible_T: Entries that each query may see.
        selection: The set to compare over in the sparse stage; None for all visible.
    """
    if selection is None:
        seen = torch.arange(scores_TC.shape[1], device=scores_TC.device) < visible_T.unsqueeze(1)
        scores = scores_TC
    else:
        seen, scores = selection.valid_TS, scores_TC.gather(1, selection.index_TS)
    has_entry = seen.any(dim=1)
    seen, scores, mass = seen[has_entry], scores[has_entry], mass[has_entry].detach().float()
    target = mass / mass.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    log_predicted = scores.masked_fill(~seen, float("-inf")).log_softmax(dim=1)
    difference = target.clamp_min(1e-30).log() - log_predicted.masked_fill(~seen, 0.0)
    return (target * difference).masked_fill(~seen, 0.0).sum(dim=1)


def balance_loss(
    scores_TE: Float[Tensor, "T E"], routes_TA: Int[Tensor, "T A"]
) -> Float[Tensor, ""]:
    """Return the sequence-wise balance loss of one sequence, unweighted: 1 when balanced.

    `sum_i f_i P_i`, f_i the share of selections that went to expert i times E, P_i the mean
    normalised score of expert i.
    """
    num_experts = scores_TE.shape[1]
    share = torch.bincount(routes_TA.flatten(), minlength=num_experts) / routes_TA.numel()
    mean_score = (scores_TE / scores_TE.sum(dim=1, keepdim=True)).mean(dim=0)
    return (num_experts * share * mean_score).sum()

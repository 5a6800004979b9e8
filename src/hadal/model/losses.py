"""Losses of parts that the language-model loss does not reach (spec/model.md 7.1).

Shape letters: T tokens of one sequence, S entries, E experts, A active ones.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["balance_loss", "indexer_loss"]


def indexer_loss(
    scores_TS: Float[Tensor, "T S"], mass_TS: Float[Tensor, "T S"], seen_TS: Bool[Tensor, "T S"]
) -> Float[Tensor, " T1"]:
    """Return KL(target || softmax(scores)) of every query that sees an entry.

    The target is the share of the JOINT softmax (window, entries, sink) that the main attention
    put on each entry, summed over heads, then normalised: heads that look at the window weigh
    little. Renormalising each head over the entries first would be another target (spec T11).

    Args:
        scores_TS: Index scores of all entries, or of the selected ones in the sparse stage; the
            only input that gets a gradient.
        mass_TS: Probability on each of them, summed over heads.
        seen_TS: Which of them a query sees.
    """
    has_entry = seen_TS.any(dim=1)
    seen, scores = seen_TS[has_entry], scores_TS[has_entry]
    mass = mass_TS[has_entry].detach().float()
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

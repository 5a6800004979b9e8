"""The forward pass of training: all losses of the report over packed samples.

Samples are packed as a ragged batch: attention, compression and MTP stay within each sample, and
tokens after its last full compression window are pooled by nobody (spec 2.7). Differentiable end to
end; the indexer gets its gradient from its own loss alone and gives none to the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hadal.errors import InputError
from hadal.model.trace import Trace
from hadal.model.transformer import Transformer

__all__ = ["TrainingOutput", "training_forward"]

IGNORED = -100
"""Label of a token that no loss counts, as in torch."""


@dataclass(frozen=True)
class TrainingOutput:
    """Losses of a batch, each unweighted, and what the bias update needs.

    Attributes:
        language: Mean cross-entropy of the next token.
        mtp: Mean over MTP blocks of the cross-entropy of the token after; 0 without blocks.
        indexer: Sum over CSA layers of the indexer's divergence; 0 without a stage.
        balance: Sum over layers of the sequence-wise balance loss, 1 a layer when balanced.
        expert_loads: Tokens that each expert [E] got, by layer, for the auxiliary-loss-free bias.
        logits_TV: Of the main model; with `fast` only of the places that count, in their order.
    """

    language: Tensor
    mtp: Tensor
    indexer: Tensor
    balance: Tensor
    expert_loads: dict[str, Tensor]
    logits_TV: Tensor


def training_forward(
    model: Transformer,
    ids_T: Int[Tensor, " T"],
    lengths: Sequence[int],
    *,
    labels_T: Int[Tensor, " T"] | None = None,
    indexer_stage: Literal["dense", "sparse"] | None = None,
    window: int | None = None,
    fast: bool = False,
) -> TrainingOutput:
    """Run packed samples through the model and all of its losses.

    Args:
        model: With plain storage.
        ids_T: Samples one after another.
        lengths: Tokens of each.
        labels_T: Wanted token at each place, -100 to leave one out; by default the next token of
            the same sample.
        indexer_stage: None leaves the indexer's loss out; `dense` attends to all visible entries
            and trains the indexer to find what attention looks at; `sparse` attends to its choice.
        window: Tokens that a query sees beside entries; by default the model's. With fewer, what is
            near is to be found in entries, too.
        fast: Use the twins `training_attention`, `training_experts` and `training_mhc`, and make logits only
            where a label counts.

    Raises:
        InputError, ContextLengthError: As `Transformer.forward`.
    """
    labels_T = _checked_labels(model, ids_T, labels_T)
    trace = Trace(indexer_stage=indexer_stage, window=window, fast=fast)
    streams_TMD = model.streams(ids_T, lengths, trace=trace)
    labels_T = next_token_labels(ids_T, lengths) if labels_T is None else labels_T
    counted = labels_T != IGNORED if fast else slice(None)
    logits_TV = model.logits(streams_TMD[counted])
    return TrainingOutput(
        language=_cross_entropy(logits_TV, labels_T[counted]),
        mtp=_mtp_loss(model, streams_TMD, ids_T, labels_T, lengths, trace),
        indexer=trace.total(trace.indexer_losses),
        balance=trace.total(trace.balance_losses),
        expert_loads=trace.expert_loads,
        logits_TV=logits_TV,
    )


def _checked_labels(model: Transformer, ids_T: Tensor, labels_T: Tensor | None) -> Tensor | None:
    if labels_T is None:
        return None
    if labels_T.shape != ids_T.shape or labels_T.dtype.is_floating_point:
        raise InputError(
            f"labels: expected integers of shape {list(ids_T.shape)}, got "
            f"{labels_T.dtype} {list(labels_T.shape)}"
        )
    counted = labels_T[labels_T != IGNORED]
    if counted.numel() and (counted.min() < 0 or counted.max() >= model.config.vocab_size):
        raise InputError(
            f"labels: expected 0..{model.config.vocab_size - 1} or {IGNORED}, got "
            f"{int(counted.min())}..{int(counted.max())}"
        )
    return labels_T.long()


def next_token_labels(ids_T: Int[Tensor, " T"], lengths: Sequence[int]) -> Int[Tensor, " T"]:
    """Return the next token of every place, -100 at the end of each sample."""
    labels_T = ids_T.roll(-1).long()
    labels_T[torch.tensor(list(lengths)).cumsum(0).to(ids_T.device) - 1] = IGNORED
    return labels_T


def _cross_entropy(logits_TV: Float[Tensor, "T V"], labels_T: Tensor) -> Tensor:
    """Return the mean over counted places; 0, with a gradient, where none counts."""
    total = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")
    return total / (labels_T != IGNORED).sum().clamp_min(1)


def _mtp_loss(
    model: Transformer,
    streams_TMD: Tensor,
    ids_T: Tensor,
    labels_T: Tensor,
    lengths: Sequence[int],
    trace: Trace,
) -> Tensor:
    """Chain the MTP blocks: each sees one token more, and each sample loses its last place."""
    losses: list[Tensor] = []
    for mtp_idx in range(len(model.mtp)):
        keep = torch.ones(ids_T.shape[0], dtype=torch.bool, device=ids_T.device)
        keep[torch.tensor(list(lengths), device=ids_T.device).cumsum(0) - 1] = False
        next_ids_T, next_labels_T = ids_T.roll(-1)[keep], labels_T.roll(-1)[keep]
        streams_TMD, ids_T, labels_T = streams_TMD[keep], next_ids_T, next_labels_T
        lengths = [n - 1 for n in lengths if n > 1]
        if not lengths:
            break
        counted = labels_T != IGNORED if trace.fast else None
        logits_TV, streams_TMD = model.draft(
            streams_TMD, ids_T, lengths, mtp_idx=mtp_idx, trace=trace, logits_at=counted
        )
        losses.append(_cross_entropy(logits_TV, labels_T if counted is None else labels_T[counted]))
    return torch.stack(losses).mean() if losses else torch.zeros((), device=ids_T.device)

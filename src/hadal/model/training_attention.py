"""Core attention of a whole sequence with gradients: fast twin of `core_attention` and `Indexer.choose`.

What differs from the reference: float32 instead of float64 inside; entries that are not chosen are masked,
not left out, so that no row is gathered; equal index scores may be chosen in another order. Shape letters as
in `core_attention`; I index heads.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.model.losses import indexer_loss

__all__ = ["training_attention"]

_QUERY_BLOCK = 128


def training_attention(
    own: Mapping[str, Tensor],
    entries_CK: Float[Tensor, "C K"] | None,
    index_keys_CK: Tensor | None,
    visible_T: Tensor,
    sink_H: Float[Tensor, " H"],
    *,
    window: int,
    top_k: int | None,
    with_loss: bool,
) -> tuple[Float[Tensor, "T H K"], list[Tensor]]:
    """Attend with every query of one sequence that begins with the first of them.

    Args:
        own: `query`, `window` and, where there is an indexer, `index_query` and `index_weight`.
        entries_CK: Compressed entries; None in a layer without.
        index_keys_CK: Their index keys, where there is an indexer.
        visible_T: Entries that each query may see.
        sink_H: As in `Keys`.
        window: Keys that a query sees, itself included.
        top_k: Entries to choose; None for all that are visible.
        with_loss: Whether to return the indexer's loss.

    Returns:
        The outputs, still rotated, and the divergence of each query that sees an entry.
    """
    outputs: list[Tensor] = []
    losses: list[Tensor] = []
    for start in range(0, visible_T.shape[0], _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, visible_T.shape[0]))
        low = max(0, rows.start - window + 1)
        near_PK, seen = (
            own["window"][low : rows.stop],
            _window_seen(rows, low, window, sink_H.device),
        )
        keys, scores_BC = near_PK, None
        num_seen = int(visible_T[rows.stop - 1]) if entries_CK is not None else 0
        seen_BC = seen[:, :0]
        if entries_CK is not None and num_seen:
            keys = torch.cat((near_PK, entries_CK[:num_seen]))
            seen_BC = torch.arange(num_seen, device=seen.device) < visible_T[rows].unsqueeze(1)
            chooses = top_k is not None and num_seen > top_k
            if index_keys_CK is not None and (chooses or with_loss):
                query, weight = own["index_query"][rows], own["index_weight"][rows]
                scores_BC = _index_scores(query, weight, index_keys_CK[:num_seen])
            if chooses and scores_BC is not None and top_k is not None:
                seen_BC = _best(scores_BC, seen_BC, top_k)
        probabilities = _probabilities(
            own["query"][rows], keys, torch.cat((seen, seen_BC), dim=1), sink_H
        )
        outputs.append((probabilities.flatten(0, 1) @ keys).unflatten(0, (-1, sink_H.shape[0])))
        if with_loss and scores_BC is not None:
            mass_BC = probabilities[..., near_PK.shape[0] :].detach().sum(dim=1)
            losses.append(indexer_loss(scores_BC, mass_BC, seen_BC))
    return torch.cat(outputs), losses


def _window_seen(rows: slice, low: int, window: int, device: torch.device) -> Tensor:
    key = torch.arange(low, rows.stop, device=device)
    distance = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) - key
    return (distance >= 0) & (distance < window)


def _probabilities(q_BHK: Tensor, keys: Tensor, seen: Tensor, sink_H: Tensor) -> Tensor:
    logits = (q_BHK.flatten(0, 1) @ keys.T).unflatten(0, (-1, sink_H.shape[0]))
    hidden = torch.zeros(seen.shape, device=keys.device).masked_fill_(~seen, float("-inf"))
    logits = logits * q_BHK.shape[-1] ** -0.5 + hidden.unsqueeze(1)
    sink_BH1 = sink_H.reshape(1, -1, 1).expand(logits.shape[0], -1, 1)
    return torch.cat((logits, sink_BH1), dim=-1).softmax(dim=-1)[..., :-1]


def _index_scores(query_BIK: Tensor, weight_BI: Tensor, keys_CK: Tensor) -> Tensor:
    """Return what `indexer.index_scores` does, with the heads as one product."""
    products = (query_BIK.flatten(0, 1) @ keys_CK.T).relu().unflatten(0, weight_BI.shape)
    return torch.bmm(weight_BI.unsqueeze(1), products).squeeze(1)


def _best(scores_BC: Tensor, seen_BC: Tensor, k: int) -> Tensor:
    best = scores_BC.detach().masked_fill(~seen_BC, float("-inf")).topk(k, dim=1).indices
    return torch.zeros_like(seen_BC).scatter_(1, best, True) & seen_BC

"""Core attention of a whole sequence with gradients: fast twin of `core_attention` and `Indexer.choose`.

What differs from the reference: float32 instead of float64 inside; where there are few entries, those that are not
chosen are masked, not left out, so that no row is gathered; equal index scores may be chosen in another order. Shape letters
as in `core_attention`; I index heads, S chosen entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hadal.model.losses import indexer_loss

__all__ = ["training_attention"]

_QUERY_BLOCK = {"cpu": 128, "cuda": 2048}
"""Queries at once: what a core's cache holds, and enough for a GPU not to wait for the next kernel."""
_RECOMPUTED_FROM = 8192
"""Queries of a sequence from which on blocks are computed again for the gradient, not kept: every query has its
share of every entry, so that what is kept grows with the square of the length."""

_GATHERED_FROM = 8
"""Times `top_k`: of so many entries those that were chosen are gathered, and the others cost their score alone."""


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
    num_queries = visible_T.shape[0]
    size = _QUERY_BLOCK.get(visible_T.device.type, 128)
    pieces = own["window"].split(size)
    keys = _Keys(pieces, entries_CK, index_keys_CK, sink_H, window, top_k, with_loss)
    blocks = {n: own[n].split(size) for n in ("query", "index_query", "index_weight") if n in own}
    outputs: list[Tensor] = []
    losses: list[Tensor] = []
    for at, visible_B in enumerate(visible_T.split(size)):
        block = {name: tensors[at] for name, tensors in blocks.items()}
        if num_queries >= _RECOMPUTED_FROM:
            output, loss = checkpoint(
                keys.attend,
                at * size,
                block,
                visible_B,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            output, loss = keys.attend(at * size, block, visible_B)
        outputs.append(output)
        losses += [] if loss is None else [loss]
    return torch.cat(outputs), losses


@dataclass(frozen=True)
class _Keys:
    """What all queries of a sequence look at; fields are arguments of `training_attention`.

    Window keys come block by block: the gradient of a slice of all of them would be as long as all of them.
    """

    window_pieces: tuple[Tensor, ...]
    entries_CK: Tensor | None
    index_keys_CK: Tensor | None
    sink_H: Tensor
    window: int
    top_k: int | None
    with_loss: bool

    def attend(
        self, start: int, block: Mapping[str, Tensor], visible_B: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of consecutive queries, and the divergences of their indexer."""
        rows = slice(start, start + visible_B.shape[0])
        low = max(0, start - self.window + 1)
        size = self.window_pieces[0].shape[0]
        first = low // size
        near_PK = torch.cat(self.window_pieces[first : start // size + 1])[low - first * size :]
        seen = _window_seen(rows, low, self.window, self.sink_H.device)
        num_seen = int(visible_B[-1]) if self.entries_CK is not None else 0
        if self.top_k is not None and num_seen > _GATHERED_FROM * self.top_k:
            return self._attend_gathered(block, visible_B, near_PK, seen, num_seen)
        keys, scores_BC, seen_BC = near_PK, None, seen[:, :0]
        if self.entries_CK is not None and num_seen:
            keys = torch.cat((near_PK, self.entries_CK[:num_seen]))
            scores_BC, seen_BC = self._choose(block, visible_B, num_seen)
        query_BHK = block["query"]
        logits = (query_BHK.flatten(0, 1) @ keys.T).unflatten(0, query_BHK.shape[:2])
        probabilities = self._probabilities(logits, torch.cat((seen, seen_BC), dim=1))
        output = (probabilities.flatten(0, 1) @ keys).unflatten(0, query_BHK.shape[:2])
        if not self.with_loss or scores_BC is None:
            return output, None
        mass_BC = probabilities[..., near_PK.shape[0] :].detach().sum(dim=1)
        return output, indexer_loss(scores_BC, mass_BC, seen_BC)

    def _attend_gathered(
        self,
        block: Mapping[str, Tensor],
        visible_B: Tensor,
        near_PK: Tensor,
        seen: Tensor,
        num_seen: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Do the same with every query's own entries."""
        assert self.entries_CK is not None
        assert self.index_keys_CK is not None
        assert self.top_k is not None
        query, weight = block["index_query"], block["index_weight"]
        index_keys_CK = self.index_keys_CK[:num_seen]
        with torch.no_grad():
            hidden_BC = torch.arange(num_seen, device=seen.device) >= visible_B.unsqueeze(1)
            scores_BC = _index_scores(query, weight, index_keys_CK)
            best = scores_BC.masked_fill_(hidden_BC, float("-inf")).topk(self.top_k, dim=1)
        seen_BS = best.values > float("-inf")
        shape, index = best.indices.shape, best.indices.flatten()
        chosen_BSK = self.entries_CK.index_select(0, index).unflatten(0, shape)
        query_BHK, num_near = block["query"], near_PK.shape[0]
        near = (query_BHK.flatten(0, 1) @ near_PK.T).unflatten(0, query_BHK.shape[:2])
        logits = torch.cat((near, torch.bmm(query_BHK, chosen_BSK.mT)), dim=2)
        probabilities = self._probabilities(logits, torch.cat((seen, seen_BS), dim=1))
        near, far = probabilities.split((num_near, self.top_k), dim=2)
        output = (near.flatten(0, 1) @ near_PK).unflatten(0, near.shape[:2])
        output = output + torch.bmm(far, chosen_BSK)
        if not self.with_loss:
            return output, None
        keys_BSK = index_keys_CK.index_select(0, index).unflatten(0, shape)
        scores_BIS = torch.bmm(query, keys_BSK.mT).relu()
        scores_BS = torch.bmm(weight.unsqueeze(1), scores_BIS).squeeze(1)
        return output, indexer_loss(scores_BS, far.detach().sum(dim=1), seen_BS)

    def _probabilities(self, logits_BHP: Tensor, seen_BP: Tensor) -> Tensor:
        hidden = torch.zeros(seen_BP.shape, device=seen_BP.device)
        hidden = hidden.masked_fill_(~seen_BP, float("-inf")).unsqueeze(1)
        logits_BHP = logits_BHP * self.window_pieces[0].shape[-1] ** -0.5 + hidden
        sink_BH1 = self.sink_H.reshape(1, -1, 1).expand(logits_BHP.shape[0], -1, 1)
        return torch.cat((logits_BHP, sink_BH1), dim=-1).softmax(dim=-1)[..., :-1]

    def _choose(
        self, block: Mapping[str, Tensor], visible_B: Tensor, num_seen: int
    ) -> tuple[Tensor | None, Tensor]:
        """Return the index scores, where they are needed, and which entries each query sees."""
        seen_BC = torch.arange(num_seen, device=visible_B.device) < visible_B.unsqueeze(1)
        chooses = self.top_k is not None and num_seen > self.top_k
        if self.index_keys_CK is None or not (chooses or self.with_loss):
            return None, seen_BC
        keys_CK = self.index_keys_CK[:num_seen]
        scores_BC = _index_scores(block["index_query"], block["index_weight"], keys_CK)
        if chooses and self.top_k is not None:
            seen_BC = _best(scores_BC, seen_BC, self.top_k)
        return scores_BC, seen_BC


def _window_seen(rows: slice, low: int, window: int, device: torch.device) -> Tensor:
    key = torch.arange(low, rows.stop, device=device)
    distance = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) - key
    return (distance >= 0) & (distance < window)


def _index_scores(query_BIK: Tensor, weight_BI: Tensor, keys_CK: Tensor) -> Tensor:
    """Return what `indexer.index_scores` does, with the heads as one product."""
    products = (query_BIK.flatten(0, 1) @ keys_CK.T).relu().unflatten(0, weight_BI.shape)
    return torch.bmm(weight_BI.unsqueeze(1), products).squeeze(1)


def _best(scores_BC: Tensor, seen_BC: Tensor, k: int) -> Tensor:
    best = scores_BC.detach().masked_fill(~seen_BC, float("-inf")).topk(k, dim=1).indices
    return torch.zeros_like(seen_BC).scatter_(1, best, True) & seen_BC

"""The lightning indexer: which compressed entries a query attends to (report 2.3.1; spec 2.8).

Cheap queries (from the shared query latent) score every visible entry's index key:
`I = sum_h w_h relu(q_h . k)`. Only the order of the scores is used; they get their gradient from a
loss of their own (`losses.indexer_loss`). Shape letters: T tokens, C entries, I index heads,
K index head dim, R width of the query latent.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hadal.config import LayerKind, ModelConfig
from hadal.model import quant
from hadal.model.cache import EntryStore
from hadal.model.compressor import Compressor
from hadal.model.kernels.attention import native_choice
from hadal.model.kernels.plans import Numbers
from hadal.model.linear import Formats, Linear, Role
from hadal.model.product import product
from hadal.model.rope import Rotation, rotate
from hadal.model.selection import RunningTopK, Selection, all_visible

__all__ = ["Indexer", "folded_scores", "index_scores"]

_QUERY_BLOCK = 64
_KEY_BLOCK = 1024
"""Products of 64 queries and 8 heads for 1,024 keys are 2 MiB, at any length of the context."""


def index_scores(
    query_TIK: Float[Tensor, "T I K"],
    weight_TI: Float[Tensor, "T I"],
    key_CK: Float[Tensor, "C K"],
    *,
    in_bfloat16: bool,
) -> Float[Tensor, "T C"]:
    """Return the score of every entry for every query, head by head to bound memory.

    In BF16, products, weighted terms and the result are rounded, as in the published code, but the
    sum over heads accumulates in float32, as a reduction of a BF16 tensor does.
    """
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    query, weight, key = query_TIK.to(dtype), weight_TI.to(dtype), key_CK.to(dtype)
    scores = torch.zeros(query.shape[0], key.shape[0], dtype=torch.float32, device=key.device)
    for head in range(query.shape[1]):
        scores = scores + (weight[:, head, None] * product(query[:, head], key).relu()).float()
    return scores.to(dtype).float()


def folded_scores(
    query_TIK: Float[Tensor, "T I K"], weight_TI: Float[Tensor, "T I"], key_CK: Float[Tensor, "C K"]
) -> Float[Tensor, "T C"]:
    """Return what `index_scores` does in float32, for inference: three times as fast on a CPU.

    The weights are folded into the queries, `w relu(q . k) = sign(w) relu(|w| q . k)`, so that all
    heads are one product and one signed sum. Keys are padded to whole blocks: the bits of a product
    depend on its width.
    """
    num_keys = key_CK.shape[0]
    key_CK = F.pad(key_CK.float(), (0, 0, 0, -num_keys % _KEY_BLOCK))
    folded = (query_TIK * weight_TI.abs().unsqueeze(-1)).float().flatten(0, 1)
    products_TIC = product(folded, key_CK).relu_().unflatten(0, weight_TI.shape)
    return torch.bmm(weight_TI.float().sign().unsqueeze(1), products_TIC).squeeze(1)[:, :num_keys]


class Indexer(nn.Module):
    """Projections and the index keys' own compressor."""

    def __init__(self, config: ModelConfig, formats: Formats) -> None:
        super().__init__()
        heads, width = config.index_n_heads, config.index_head_dim
        self.num_heads = heads
        self.precision = formats.precision
        self.wq_b = Linear(config.q_lora_rank, heads * width, Role.DENSE, formats)
        self.weights_proj = Linear(config.hidden_size, heads, Role.PLAIN, formats)
        self.compressor = Compressor(config, LayerKind.CSA, width, formats)
        self.scale = width**-0.5 * heads**-0.5

    def queries(
        self, latent_TR: Float[Tensor, "T R"], x_TD: Float[Tensor, "T D"], rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Return index queries [T, I, K] and the signed head weights [T, I]."""
        query_TIK = self.wq_b(latent_TR).unflatten(-1, (self.num_heads, -1))
        query_TIK = self.simulate_storage(rotate(query_TIK, rotation))
        return query_TIK, self.weights_proj(x_TD) * self.scale

    def described(self) -> Numbers | None:
        """Return what kernels read of the projections."""
        wq_b, weights = self.wq_b.described(), self.weights_proj.described()
        compressor = self.compressor.described()
        return wq_b and weights and compressor and [*wq_b, *weights, *compressor]

    def choose(
        self,
        query_TIK: Float[Tensor, "T I K"],
        weight_TI: Float[Tensor, "T I"],
        keys: EntryStore,
        visible_T: Int[Tensor, " T"],
        *,
        top_k: int | None,
        with_scores: bool,
    ) -> tuple[Selection | None, Float[Tensor, "T S"] | None]:
        """Score the entries and choose among them, in blocks of queries and keys to bound memory.

        Args:
            query_TIK: Index queries of one sequence.
            weight_TI: Their head weights.
            keys: Index keys of all entries so far.
            visible_T: How many of them each query may see.
            top_k: How many to choose; None for all.
            with_scores: Return the scores, of the chosen entries or of all, for the loss.
        """
        if top_k is not None and not with_scores:
            chosen = self._native_choice(query_TIK, weight_TI, keys, visible_T, top_k)
            if chosen is not None:
                return chosen, None
        selections: list[Selection] = []
        kept: list[Tensor] = []
        for start in range(0, query_TIK.shape[0], _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            best = RunningTopK(visible_T[rows], top_k) if top_k is not None else None
            blocks: list[Tensor] = []
            for first in range(0, len(keys), _KEY_BLOCK):
                scores = self._scores(
                    query_TIK[rows], weight_TI[rows], keys.rows(first, first + _KEY_BLOCK)
                )
                if best is not None:
                    best.add(scores.detach(), first)
                if with_scores:
                    blocks.append(scores)
            if best is not None:
                selections.append(best.selection())
            if with_scores:
                scores_TC = torch.cat(blocks, dim=1) if blocks else weight_TI[rows, :0]
                kept.append(scores_TC.gather(1, selections[-1].index_TS) if best else scores_TC)
        return (
            Selection.joined(selections) if selections else None,
            torch.cat(kept) if with_scores else None,
        )

    def _native_choice(
        self, query_TIK: Tensor, weight_TI: Tensor, keys: EntryStore, visible_T: Tensor, top_k: int
    ) -> Selection | None:
        pages, rounds = keys.pages(), self.precision.index_scores_bf16
        if pages is None:
            return None
        index_TS = native_choice(
            query_TIK, weight_TI, pages, len(keys), visible_T, top_k, in_bfloat16=rounds
        )
        return None if index_TS is None else Selection(index_TS, all_visible(visible_T, index_TS))

    def _scores(self, query_TIK: Tensor, weight_TI: Tensor, key_CK: Tensor) -> Tensor:
        bfloat16 = self.precision.index_scores_bf16
        if bfloat16 or torch.is_grad_enabled():
            return index_scores(query_TIK, weight_TI, key_CK, in_bfloat16=bfloat16)
        return folded_scores(query_TIK, weight_TI, key_CK)

    def simulate_storage(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows K"]:
        """Rotate and round queries or keys as `precision` asks; both must pass through here."""
        if self.precision.index_hadamard:
            x = quant.hadamard(x)
        return quant.round_trip_index_keys(x) if self.precision.index_fp4 else x

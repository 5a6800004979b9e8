"""The lightning indexer: which compressed entries a query attends to (report 2.3.1; spec 2.8).

Cheap queries (from the shared query latent) score every visible entry's index key:
`I = sum_h w_h relu(q_h . k)`. Only the order of the scores is used; they get their gradient from a
loss of their own (`losses.indexer_loss`). Shape letters: T tokens, C entries, I index heads,
K index head dim, R width of the query latent.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hadal.config import LayerKind, ModelConfig
from hadal.model import quant
from hadal.model.compressor import Compressor
from hadal.model.linear import Formats, Linear, Role
from hadal.model.product import product
from hadal.model.rope import Rotation, rotate

__all__ = ["Indexer", "index_scores"]


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
    scores = torch.zeros(query.shape[0], key.shape[0], device=key.device)
    for head in range(query.shape[1]):
        scores = scores + (weight[:, head, None] * product(query[:, head], key).relu()).float()
    return scores.to(dtype).float()


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

    def simulate_storage(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows K"]:
        """Rotate and round queries or keys as `precision` asks; both must pass through here."""
        if self.precision.index_hadamard:
            x = quant.hadamard(x)
        return quant.round_trip_index_keys(x) if self.precision.index_fp4 else x

"""What V4 is compared with: DeepSeek-V3.2, and grouped-query attention in BF16 (spec 6)."""

from dataclasses import dataclass
from typing import Final

__all__ = ["BASELINES", "V32", "Gqa8"]


@dataclass(frozen=True, kw_only=True)
class V32:
    """DeepSeek-V3.2: multi-head latent attention with top-k selection, in its MQA form.

    Dimensions are those of its published config.json.
    """

    num_layers: int = 61
    num_dense_layers: int = 3
    hidden: int = 7168
    dense_inner: int = 18_432
    expert_inner: int = 2048
    num_experts: int = 256
    active_experts: int = 8
    heads: int = 128
    q_latent: int = 1536
    kv_latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048
    vocab: int = 129_280

    def matrix_params_fp8(self) -> int:
        """Return the numbers in the FP8 matrices that one token multiplies with."""
        attention = (
            self.hidden * self.q_latent
            + self.q_latent * self.heads * (self.nope + self.rope)
            + self.hidden * (self.kv_latent + self.rope)
            + self.heads * self.kv_latent * (self.nope + self.value)
            + self.heads * self.value * self.hidden
            + self.q_latent * self.index_heads * self.index_dim
            + self.hidden * self.index_dim
        )
        moe_layers = self.num_layers - self.num_dense_layers
        experts = 3 * self.hidden * self.expert_inner * (self.active_experts + 1)
        dense = 3 * self.hidden * self.dense_inner
        return self.num_layers * attention + moe_layers * experts + self.num_dense_layers * dense

    def matrix_params_small(self) -> int:
        """Return the numbers in the unquantised matrices but the head."""
        gates = (self.num_layers - self.num_dense_layers) * self.hidden * self.num_experts
        return gates + self.num_layers * self.hidden * self.index_heads

    def kv_bytes_per_token(self) -> int:
        """Return 61 x (512 FP8 + 4 FP32 scales + 64 BF16 + index key 128 FP8 + FP32 scale)."""
        return self.num_layers * (512 + 4 * 4 + 64 * 2 + 128 + 4)


@dataclass(frozen=True, kw_only=True)
class Gqa8:
    """Grouped-query attention, 8 KV heads of 128 in BF16; only its cache is compared."""

    num_layers: int = 61

    def kv_bytes_per_token(self) -> int:
        """Return keys and values of 8 heads of 128 in two bytes."""
        return self.num_layers * 2 * 8 * 128 * 2


BASELINES: Final = {"v3.2": V32(), "gqa8": Gqa8()}

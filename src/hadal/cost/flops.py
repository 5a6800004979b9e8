"""FLOPs of one more token at a context length, by part and by number format (spec 6.2, 6.3).

Two per multiply-add. A convention says how much an operation in each format counts; the report's
Figure 1 counts FP8 equivalents at hardware peak ratios. Normalisation, softmax and other
element-wise work are left out, as there.
"""

from dataclasses import dataclass
from typing import Final, Literal

from hadal.config import LayerKind, ModelConfig
from hadal.cost.baselines import V32
from hadal.cost.inventory import Part, Store, TensorGroup, inventory

__all__ = ["CONVENTIONS", "Convention", "Flops", "flops_per_token", "v32_flops_per_token"]

FormatName = Literal["fp8", "bf16", "fp32", "core", "fp4"]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How much one FLOP of each format counts.

    `fp32` are the compressors, gate and mHC, which the published code computes in float32 and most
    accounts count as BF16; `core` is attention itself.
    """

    text: str
    fp8: float = 1.0
    bf16: float = 2.0
    fp32: float = 2.0
    core: float = 2.0
    fp4: float = 0.5

    def weight(self, name: FormatName) -> float:
        """Return what one FLOP of a format counts."""
        return float(getattr(self, name))


CONVENTIONS: Final[dict[str, Convention]] = {
    "fp8-equivalent": Convention(
        text="FP8 equivalents at peak ratios: FP8 x1, BF16 x2, FP4 x1/2; core attention BF16, "
        "indexer FP4 (V3.2: FP8), experts at FP8 rate; 2 FLOPs a multiply-add"
    ),
    "raw": Convention(
        text="every multiply-add 2 FLOPs, whatever its format", bf16=1, fp32=1, core=1, fp4=1
    ),
    "fp32-parts": Convention(
        text="as fp8-equivalent, but compressors, gate and mHC as FP32 x4", fp32=4
    ),
    "fp8-core": Convention(text="as fp8-equivalent, but core attention at FP8 rate", core=1),
    "fp4-as-fp8": Convention(text="as fp8-equivalent, but FP4 at FP8 rate", fp4=1),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part of a token's forward pass."""

    part: str
    format: FormatName
    count: float


def flops_per_token(config: ModelConfig, context: int) -> list[Flops]:
    """Return the FLOPs of the token at position `context`, MTP blocks left out."""
    matrices = {"linear": 0, "small": 0, "head": 0}
    for group in inventory(config):
        if group.multiplied and not group.mtp:
            matrices[_matrix_kind(group)] += 2 * group.used * group.size
    return [
        Flops("linear", "fp8", matrices["linear"]),
        Flops("small", "fp32", matrices["small"]),
        Flops("head", "bf16", matrices["head"]),
        Flops("core attention", "core", _core(config, context)),
        Flops("indexer", "fp4", _indexer(config, context)),
    ]


def _matrix_kind(group: TensorGroup) -> str:
    if group.store in (Store.FP8, Store.EXPERT):
        return "linear"
    return "head" if group.part is Part.HEAD else "small"


def _core(config: ModelConfig, context: int) -> float:
    keys = {
        LayerKind.SWA: config.sliding_window,
        LayerKind.CSA: min(config.index_topk, context / 4) + config.sliding_window,
        LayerKind.HCA: context / 128 + config.sliding_window,
    }
    per_key = 4 * config.head_dim * config.num_attention_heads
    return per_key * sum(config.count(kind) * keys[kind] for kind in LayerKind)


def _indexer(config: ModelConfig, context: int) -> float:
    per_entry = 2 * config.index_n_heads * config.index_head_dim
    return config.count(LayerKind.CSA) * context / 4 * per_entry


def v32_flops_per_token(model: V32, context: int) -> list[Flops]:
    """Return the same for the predecessor; its indexer runs in FP8 over every token."""
    key_dims = model.kv_latent + model.rope + model.kv_latent
    return [
        Flops("linear", "fp8", 2 * model.matrix_params_fp8()),
        Flops("small", "bf16", 2 * model.matrix_params_small()),
        Flops("head", "bf16", 2 * model.vocab * model.hidden),
        Flops(
            "core attention",
            "core",
            2 * model.heads * key_dims * min(model.topk, context) * model.num_layers,
        ),
        Flops(
            "indexer", "fp8", 2 * model.num_layers * context * model.index_heads * model.index_dim
        ),
    ]

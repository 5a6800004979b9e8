"""`ModelConfig`: every number that defines a V4 network, under the names of the upstream config.json.

Frozen and checked as a whole: a config that exists is consistent, and the error for one that is not
lists everything that does not fit. Reading JSON is in `upstream.py`, the published sizes are in
`presets.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from hadal.config import presets
from hadal.errors import ConfigError

__all__ = ["LayerKind", "ModelConfig", "WeightQuantization", "YarnScaling"]


class LayerKind(StrEnum):
    """What a layer attends to beside its sliding window (report section 2.3)."""

    SWA = "swa"
    """Nothing: the window only."""
    CSA = "csa"
    """The top entries of a 4x compression, chosen by the lightning indexer."""
    HCA = "hca"
    """All entries of a 128x compression."""


_KIND_OF_RATIO = {0: LayerKind.SWA, 4: LayerKind.CSA, 128: LayerKind.HCA}


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN on the compressed branches (upstream key `rope_scaling`).

    There is no amplitude factor in V4: cos and sin keep magnitude 1 (spec T6c).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class WeightQuantization:
    """Stored format of the large matrices (upstream key `quantization_config`)."""

    scale_dtype: Literal["ue8m0", "float32"] = "ue8m0"
    """Stored dtype of the `.scale` tensors; the Base checkpoints use float32 (spec 1.2)."""
    weight_block_size: tuple[int, int] = (128, 128)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Numbers of one network; field names are those of the upstream config.json.

    Raises:
        ConfigError: The values do not fit together; the message lists every conflict.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    """One per main layer, then one per MTP block (which must be 0)."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    """Leading layers whose experts are looked up by token id instead of routed."""
    routed_scaling_factor: float
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    compress_rope_theta: float = 160_000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 1_048_576
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: Literal["fp4", "fp8"] | None = None
    """Stored format of the routed experts; None with an unquantised checkpoint."""
    quantization_config: WeightQuantization | None = None
    """None: all matrices are stored as plain floats."""

    def __post_init__(self) -> None:
        problems = _wrong_types(self) or _conflicts(self)
        if problems:
            raise ConfigError(
                "model config does not fit together:\n" + "\n".join(f"  {p}" for p in problems)
            )

    @classmethod
    def v4_flash(cls) -> Self:
        """DeepSeek-V4-Flash: 284B parameters, 13B active, FP4 experts."""
        return cls(rope_scaling=_YARN, **presets.FLASH, **_INSTRUCT)

    @classmethod
    def v4_pro(cls) -> Self:
        """DeepSeek-V4-Pro: 1.6T parameters, 49B active, FP4 experts."""
        return cls(rope_scaling=_YARN, **presets.PRO, **_INSTRUCT)

    @classmethod
    def v4_flash_base(cls) -> Self:
        """DeepSeek-V4-Flash-Base: the same network, FP8 experts, float32 scales."""
        return cls(rope_scaling=_YARN, **presets.FLASH, **_BASE)

    @classmethod
    def v4_pro_base(cls) -> Self:
        """DeepSeek-V4-Pro-Base: FP8 experts; float32 scales by analogy with Flash-Base."""
        return cls(rope_scaling=_YARN, **presets.PRO, **_BASE)

    @classmethod
    def nano(cls) -> Self:
        """A few million parameters with every mechanism of the large ones, stored as plain floats."""
        return cls(rope_scaling=_YARN, **presets.NANO)

    @classmethod
    def from_upstream(cls, config_json: dict[str, Any] | str | Path) -> "ModelConfig":
        """Read an upstream config.json (a dict, its path, or the checkpoint's folder).

        Raises:
            ConfigError: The file is not one of a V4 model, or holds a key or value unknown here.
        """
        from hadal.config.upstream import read_config

        return read_config(config_json)

    def quantized(self, kind: Literal["instruct", "base"]) -> Self:
        """Return this config with the stored formats of the published instruct or Base weights."""
        return dataclasses.replace(self, **(_INSTRUCT if kind == "instruct" else _BASE))

    def narrowed(self) -> Self:
        """Return the same layers and mechanisms at widths that fit a laptop."""
        groups = min(self.o_groups, presets.NARROW["num_attention_heads"])
        return dataclasses.replace(self, o_groups=groups, **presets.NARROW)

    def plain(self) -> Self:
        """Return this config with all weights stored as plain floats."""
        return dataclasses.replace(self, expert_dtype=None, quantization_config=None)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each main layer; MTP blocks, always SWA, are not included."""
        ratios = self.compress_ratios[: self.num_hidden_layers]
        return tuple(_KIND_OF_RATIO[r] for r in ratios if r in _KIND_OF_RATIO)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one low-rank output projection."""
        return self.num_attention_heads // self.o_groups

    def count(self, kind: LayerKind) -> int:
        """Return how many main layers are of a kind."""
        return self.layer_kinds.count(kind)


_YARN = YarnScaling(factor=16.0, original_max_position_embeddings=65_536)
_INSTRUCT: dict[str, Any] = {"expert_dtype": "fp4", "quantization_config": WeightQuantization()}
_BASE: dict[str, Any] = {
    "expert_dtype": "fp8",
    "quantization_config": WeightQuantization(scale_dtype="float32"),
}

_POSITIVE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups "
    "o_lora_rank sliding_window index_n_heads index_head_dim index_topk n_routed_experts "
    "num_experts_per_tok moe_intermediate_size hc_mult hc_sinkhorn_iters max_position_embeddings "
    "routed_scaling_factor swiglu_limit hc_eps rms_norm_eps rope_theta compress_rope_theta"
).split()
_NOT_NEGATIVE = ("num_hash_layers", "num_nextn_predict_layers", "qk_rope_head_dim")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS: dict[object, tuple[Callable[[Any], bool], str]] = {
    int: (_is_whole, "a whole number"),
    float: (_is_number, "a finite number"),
    tuple[int, ...]: (
        lambda v: isinstance(v, tuple) and all(_is_whole(r) for r in v),
        "a tuple of whole numbers",
    ),
    Literal["fp4", "fp8"] | None: (lambda v: v in (None, "fp4", "fp8"), "'fp4', 'fp8' or None"),
    YarnScaling | None: (lambda v: v is None or isinstance(v, YarnScaling), "YarnScaling or None"),
    WeightQuantization | None: (
        lambda v: v is None or isinstance(v, WeightQuantization),
        "WeightQuantization or None",
    ),
}


def _wrong_types(c: ModelConfig) -> list[str]:
    """Return one line for each field that is not what its annotation says."""
    found: list[str] = []
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        check, expected = _CHECKS[field.type]
        if not check(value):
            found.append(f"{field.name}: expected {expected}, got {value!r:.80}")
    return found


def _yarn_conflicts(c: ModelConfig) -> list[str]:
    yarn = c.rope_scaling
    if yarn is None:
        return []
    found = [
        f"rope_scaling.{f.name}: expected a positive number, got {getattr(yarn, f.name)!r:.80}"
        for f in dataclasses.fields(yarn)
        if not _is_number(getattr(yarn, f.name)) or getattr(yarn, f.name) <= 0
    ]
    if c.compress_rope_theta <= 1:
        found.append(f"compress_rope_theta with YaRN must exceed 1, got {c.compress_rope_theta}")
    return found


def _conflicts(c: ModelConfig) -> list[str]:
    """Return one line for each value that is out of range or contradicts another."""
    found = [f"{n} must be positive, got {getattr(c, n)}" for n in _POSITIVE if getattr(c, n) <= 0]
    found += [f"{n} must be >= 0, got {getattr(c, n)}" for n in _NOT_NEGATIVE if getattr(c, n) < 0]
    if found:
        return found  # the relations below divide by these
    num_blocks = c.num_hidden_layers + c.num_nextn_predict_layers
    mtp_ratios = c.compress_ratios[c.num_hidden_layers :]
    bad_ratios = sorted(set(c.compress_ratios) - set(_KIND_OF_RATIO))
    bad_ids = [i for i in (c.bos_token_id, c.eos_token_id) if not 0 <= i < c.vocab_size]
    checks = (
        (
            len(c.compress_ratios) == num_blocks,
            f"compress_ratios: expected {num_blocks} entries (num_hidden_layers "
            f"{c.num_hidden_layers} + num_nextn_predict_layers {c.num_nextn_predict_layers}), "
            f"got {len(c.compress_ratios)}",
        ),
        (not bad_ratios, f"compress_ratios: expected 0, 4 or 128, got {bad_ratios}"),
        (not any(mtp_ratios), f"compress_ratios of MTP blocks must be 0, got {mtp_ratios}"),
        (
            c.num_attention_heads % c.o_groups == 0,
            f"num_attention_heads {c.num_attention_heads} is not a multiple of "
            f"o_groups {c.o_groups}",
        ),
        (c.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, got {c.qk_rope_head_dim}"),
        (
            c.qk_rope_head_dim <= min(c.head_dim, c.index_head_dim),
            f"qk_rope_head_dim {c.qk_rope_head_dim} exceeds head_dim {c.head_dim} "
            f"or index_head_dim {c.index_head_dim}",
        ),
        (
            c.num_experts_per_tok <= c.n_routed_experts,
            f"num_experts_per_tok {c.num_experts_per_tok} exceeds n_routed_experts "
            f"{c.n_routed_experts}",
        ),
        (
            c.num_hash_layers <= c.num_hidden_layers,
            f"num_hash_layers {c.num_hash_layers} exceeds num_hidden_layers {c.num_hidden_layers}",
        ),
        (not bad_ids, f"token ids {bad_ids} lie outside the vocabulary of {c.vocab_size}"),
        (
            (c.expert_dtype is None) == (c.quantization_config is None),
            f"expert_dtype {c.expert_dtype!r} and quantization_config must be given together",
        ),
        (
            c.quantization_config is None
            or LayerKind.CSA not in c.layer_kinds
            or (c.index_head_dim % 32 == 0 and c.index_head_dim & (c.index_head_dim - 1) == 0),
            f"a quantised model's FP4 index keys need index_head_dim to be a power of two from 32 "
            f"on, got {c.index_head_dim}",
        ),
        (
            c.expert_dtype != "fp4" or not (c.hidden_size % 32 or c.moe_intermediate_size % 32),
            f"FP4 experts need hidden_size {c.hidden_size} and moe_intermediate_size "
            f"{c.moe_intermediate_size} to be multiples of 32",
        ),
    )
    return _yarn_conflicts(c) + [message for holds, message in checks if not holds]

"""One report for a model and a context length; the same numbers feed the table, JSON and plot."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.config import ModelConfig, read_config
from hadal.cost.baselines import BASELINES, V32, Gqa8
from hadal.cost.flops import CONVENTIONS, Flops, flops_per_token, v32_flops_per_token
from hadal.cost.inventory import Part, inventory, stored_bytes, tensor_count
from hadal.cost.kv import KV_FORMATS, LayerKV, kv_by_kind
from hadal.errors import ConfigError, InputError

__all__ = ["PRESETS", "CostReport", "Model", "estimate", "resolve"]

Model = ModelConfig | V32 | Gqa8

PRESETS = {
    "v4-flash": ModelConfig.v4_flash,
    "v4-pro": ModelConfig.v4_pro,
    "v4-flash-base": ModelConfig.v4_flash_base,
    "v4-pro-base": ModelConfig.v4_pro_base,
    "nano": ModelConfig.nano,
}


def resolve(name: str) -> Model:
    """Return the model of a preset's or baseline's name, or of a config.json.

    Raises:
        ConfigError: No such name and no such file, or the file is not one of a V4 network.
    """
    short = name.lower().removeprefix("deepseek-")
    for key in (short, f"v4-{short}"):
        if key in PRESETS:
            return PRESETS[key]()
    if short in BASELINES:
        return BASELINES[short]
    if len(name) < 4096 and Path(name).exists():
        return read_config(Path(name))
    raise ConfigError(
        f"unknown model {name!r:.80}",
        hint=f"give one of {', '.join([*PRESETS, *BASELINES])}, or the path of a config.json",
    )


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """Costs of one model at one context length.

    Attributes:
        model: As it was asked for.
        context: Tokens.
        convention: How FLOPs of different formats were added.
        parameters: By part, MTP blocks apart; empty for a baseline.
        total_parameters: Of the main model.
        active_parameters: That one token multiplies with, input embedding left out.
        mtp_parameters: Of the MTP blocks.
        weight_bytes: Of a checkpoint, MTP included, by stored dtype.
        num_tensors: Of a checkpoint.
        flops: Of the token at this position, by part, before the convention's weights.
        flops_per_token: With the weights; None for a baseline whose FLOPs are not defined.
        kv: By layer kind; empty for a baseline.
        kv_bytes_per_token: That grow with every token.
        kv_bytes: At this context, the rings included as in the report.
        ratios: FLOPs and KV bytes over those of the baselines.
    """

    model: str
    context: int
    convention: str
    kv_format: str
    parameters: dict[str, int]
    total_parameters: int
    active_parameters: int
    mtp_parameters: int
    weight_bytes: dict[str, int]
    num_tensors: int
    flops: list[Flops]
    flops_per_token: float | None
    kv: list[LayerKV]
    kv_bytes_per_token: float
    kv_bytes: int
    ratios: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the conventions spelled out."""
        return dataclasses.asdict(self) | {
            "convention_text": CONVENTIONS[self.convention].text,
            "kv_format_text": KV_FORMATS[self.kv_format].text,
        }


def estimate(
    name: str,
    context: int,
    *,
    convention: str = "fp8-equivalent",
    kv_format: str = "fp8-fp4",
) -> CostReport:
    """Return what a model costs at a context length.

    Args:
        name: Preset, baseline or path of a config.json; see `resolve`.
        context: Position of the token whose FLOPs are counted, and tokens in the cache.
        convention: A key of `CONVENTIONS`.
        kv_format: A key of `KV_FORMATS`; baselines have their own.

    Raises:
        ConfigError: The model is unknown, or its config.json is wrong.
        InputError: The context is not positive, or a key is unknown.
    """
    if context < 1:
        raise InputError(f"context: expected at least 1 token, got {context}")
    for key, known in ((convention, CONVENTIONS), (kv_format, KV_FORMATS)):
        if key not in known:
            raise InputError(f"{key!r} is not one of {', '.join(known)}")
    model = resolve(name)
    flops = model_flops(model, context)
    is_v4 = isinstance(model, ModelConfig)
    kv = kv_by_kind(model, context, KV_FORMATS[kv_format]) if is_v4 else []
    return CostReport(
        model=name,
        context=context,
        convention=convention,
        kv_format=kv_format,
        flops=flops,
        flops_per_token=weighted(flops, convention) if flops else None,
        kv=kv,
        kv_bytes_per_token=sum(k.bytes_per_token for k in kv)
        if isinstance(model, ModelConfig)
        else model.kv_bytes_per_token(),
        kv_bytes=kv_bytes(model, context, kv_format),
        ratios=_ratios(model, context, convention, kv_format),
        **_weights(model),
    )


def model_flops(model: Model, context: int) -> list[Flops]:
    """Return FLOPs by part; empty where they are not defined."""
    if isinstance(model, ModelConfig):
        return flops_per_token(model, context)
    return v32_flops_per_token(model, context) if isinstance(model, V32) else []


def weighted(flops: list[Flops], convention: str) -> float:
    """Return the sum of FLOPs under a convention."""
    return sum(f.count * CONVENTIONS[convention].weight(f.format) for f in flops)


def kv_bytes(model: Model, context: int, kv_format: str) -> int:
    """Return the cache of one sequence, float32 tails left out as in the report."""
    if isinstance(model, ModelConfig):
        layers = kv_by_kind(model, context, KV_FORMATS[kv_format])
        return sum(k.entries_bytes + k.window_bytes for k in layers)
    return model.kv_bytes_per_token() * context


def _ratios(model: Model, context: int, convention: str, kv_format: str) -> dict[str, float]:
    """Return costs over the baselines'; GQA-8 of equal depth."""
    own_kv = kv_bytes(model, context, kv_format)
    depth = model.num_hidden_layers if isinstance(model, ModelConfig) else model.num_layers
    v32, gqa8 = V32(), Gqa8(num_layers=depth)
    ratios = {
        "kv_of_v3.2": own_kv / kv_bytes(v32, context, kv_format),
        "kv_of_gqa8": own_kv / kv_bytes(gqa8, context, kv_format),
    }
    if flops := model_flops(model, context):
        base = weighted(model_flops(v32, context), convention)
        ratios["flops_of_v3.2"] = weighted(flops, convention) / base
    return ratios


def _weights(model: Model) -> dict[str, Any]:
    """Return the fields of a report that do not depend on the context."""
    groups = inventory(model) if isinstance(model, ModelConfig) else []
    parameters: dict[str, int] = {}
    weight_bytes: dict[str, int] = {}
    for group in groups:
        if group.is_parameter and not group.mtp:
            key = group.part.value
            parameters[key] = parameters.get(key, 0) + group.count * group.size
        assert isinstance(model, ModelConfig)
        for dtype, size in stored_bytes(group, model).items():
            weight_bytes[dtype] = weight_bytes.get(dtype, 0) + size
    own = [g for g in groups if g.is_parameter and not g.mtp]
    return {
        "parameters": parameters,
        "total_parameters": sum(g.count * g.size for g in own),
        "active_parameters": sum(g.used * g.size for g in own if g.part is not Part.EMBEDDING),
        "mtp_parameters": sum(g.count * g.size for g in groups if g.is_parameter and g.mtp),
        "weight_bytes": weight_bytes,
        "num_tensors": sum(tensor_count(g, model) for g in groups)
        if isinstance(model, ModelConfig)
        else 0,
    }

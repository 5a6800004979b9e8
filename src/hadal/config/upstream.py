"""Upstream config.json to `ModelConfig` and back.

One function, `_translate`, knows every other spelling in use: the short names of the publisher's
inference code, and those that transformers writes. A key that is known to nobody is an error; a key
that V4 fixes (one KV head, no attention bias) must hold the fixed value.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final, Literal

from hadal.config.model import ModelConfig, WeightQuantization, YarnScaling
from hadal.errors import ConfigError

__all__ = ["read_config", "to_upstream"]

_FIXED: Final[dict[str, Any]] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
"""Keys that every V4 network shares; another value means another architecture."""

_NOT_OURS: Final = frozenset(
    "architectures torch_dtype dtype transformers_version use_cache pad_token_id auto_map "
    "output_router_logits router_aux_loss_coef router_jitter_noise return_dict "
    "output_hidden_states output_attentions chunk_size_feed_forward id2label label2id "
    "is_encoder_decoder problem_type _name_or_path".split()
)
"""Keys that other software keeps in the same file and that say nothing about the network."""

_SHORT_NAMES: Final[dict[str, str]] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "n_hash_layers": "num_hash_layers",
    "n_activated_experts": "num_experts_per_tok",
    "moe_inter_dim": "moe_intermediate_size",
    "route_scale": "routed_scaling_factor",
    "score_func": "scoring_func",
    "norm_eps": "rms_norm_eps",
    "n_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "intermediate_size": "moe_intermediate_size",
}

_RATIO_OF_LAYER_TYPE: Final[dict[str, int]] = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
_FIELDS: Final = frozenset(f.name for f in dataclasses.fields(ModelConfig))
_DSPARK_HINT = (
    "this is a later sibling of V4 with DSpark draft modules; read its main stack alone with "
    "read_config(..., mtp=False)"
)


def read_config(
    source: dict[str, Any] | str | Path,
    *,
    expert_dtype: Literal["fp4", "fp8"] | None = None,
    mtp: bool = True,
) -> ModelConfig:
    """Read an upstream config.json.

    Args:
        source: The parsed JSON, the path of the file, or the folder that holds it.
        expert_dtype: Stored format of the experts where the file does not say (its first revision
            did not, and a guess breaks one checkpoint or the other: spec T10b).
        mtp: False leaves out every draft module, also those of DSpark checkpoints.

    Raises:
        ConfigError: Unreadable file, unknown key, unsupported value, or dimensions that do not fit.
    """
    raw = dict(source) if isinstance(source, dict) else _read_json(Path(source))
    values = _translate(raw, mtp=mtp)
    quantization = values.pop("quantization_config", None)
    if quantization is not None:
        values.setdefault("expert_dtype", expert_dtype)
        if values["expert_dtype"] not in ("fp4", "fp8"):
            raise ConfigError(
                "config.json: expert_dtype: expected 'fp4' or 'fp8', "
                f"got {values['expert_dtype']!r:.80}",
                hint="give expert_dtype=; checkpoint.load() finds it from the stored tensors",
            )
        values["quantization_config"] = _read_quantization(quantization, values["expert_dtype"])
    unknown = sorted(set(values) - _FIELDS)
    required = {f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if unknown or missing:
        raise ConfigError(
            f"config.json: unknown keys {unknown}, missing keys {missing}",
            hint=_DSPARK_HINT if any(k.startswith("dspark") for k in unknown) else None,
        )
    return ModelConfig(**values)


def to_upstream(config: ModelConfig) -> dict[str, Any]:
    """Return the upstream config.json of a config; `read_config` of it gives the config back."""
    values = dataclasses.asdict(config)
    values["compress_ratios"] = list(config.compress_ratios)
    yarn, quantization = config.rope_scaling, config.quantization_config
    values["rope_scaling"] = yarn and {"type": "yarn", **dataclasses.asdict(yarn)}
    if quantization is None:
        del values["quantization_config"], values["expert_dtype"]
    else:
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            # The published Base files say ue8m0 beside float32 scales: readers go by expert_dtype.
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": list(quantization.weight_block_size),
        }
    return {"architectures": ["DeepseekV4ForCausalLM"], **_FIXED, **values}


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"cannot read {file}: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{file} is not JSON: {err}") from err
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _nested(values: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Remove a nested object from the values and return a copy of it, None where there is none."""
    value = values.pop(key, None)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"config.json: {key}: expected an object, got {value!r:.80}")
    return None if value is None else dict(value)


def _listed(values: dict[str, Any], key: str) -> list[Any] | None:
    """Remove a list from the values and return a copy of it, None where there is none."""
    value = values.pop(key, None)
    if value is not None and not isinstance(value, list | tuple):
        raise ConfigError(f"config.json: {key}: expected a list, got {value!r:.80}")
    return None if value is None else list(value)


def _translate(raw: dict[str, Any], *, mtp: bool) -> dict[str, Any]:
    """Return the values of `raw` under our field names, legacy spellings translated."""
    values = {k: v for k, v in raw.items() if k not in _NOT_OURS}
    for short, name in _SHORT_NAMES.items():
        if short in values and values.setdefault(name, values[short]) != values.pop(short):
            raise ConfigError(f"config.json: {short} and {name} disagree")
    for key, expected in _FIXED.items():
        if key in values and (found := values.pop(key)) != expected:
            raise ConfigError(f"config.json: {key}: expected {expected!r}, got {found!r:.80}")
    _translate_rope(values)
    _translate_schedule(values, mtp=mtp)
    if isinstance(values.get("eos_token_id"), list) and values["eos_token_id"]:
        values["eos_token_id"] = values["eos_token_id"][0]
    quantization = _nested(values, "quantization_config")
    if quantization is None:
        values.pop("expert_dtype", None)
        return values
    if "expert_dtype" in quantization:  # where transformers and V4.1 keep it
        values.setdefault("expert_dtype", quantization["expert_dtype"])
    return values | {"quantization_config": quantization}


def _translate_rope(values: dict[str, Any]) -> None:
    """Fold transformers' nested `rope_parameters` into theta, scaling and the rotated width."""
    nested = _nested(values, "rope_parameters")
    factor = values.pop("partial_rotary_factor", None)
    if isinstance(factor, float) and isinstance(values.get("head_dim"), int):
        values.setdefault("qk_rope_head_dim", round(values["head_dim"] * factor))
    scaling = _nested(values, "rope_scaling")
    if nested is not None:
        main = _nested(nested, "main") or {}
        compress = _nested(nested, "compress") or nested
        values.setdefault("rope_theta", main.get("rope_theta", 10_000.0))
        values.setdefault("compress_rope_theta", compress.get("rope_theta", 160_000.0))
        scaling = scaling or compress
    if scaling is not None:
        values["rope_scaling"] = _read_yarn(scaling)


def _read_yarn(scaling: dict[str, Any]) -> YarnScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling type: expected 'yarn', got {kind!r:.80}")
    if scaling.get("attention_factor", 1.0) != 1.0:
        raise ConfigError(
            "config.json: attention_factor: V4 has no YaRN amplitude factor (expected 1.0), "
            f"got {scaling['attention_factor']!r:.80}"
        )
    known = {f.name for f in dataclasses.fields(YarnScaling)}
    inert = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor"}
    if unknown := sorted(set(scaling) - known - inert):
        raise ConfigError(f"config.json: rope_scaling: unknown keys {unknown}")
    needed = {"factor", "original_max_position_embeddings"}
    if missing := sorted(needed - set(scaling)):
        raise ConfigError(f"config.json: rope_scaling: missing keys {missing}")
    return YarnScaling(**{k: v for k, v in scaling.items() if k in known})


def _translate_schedule(values: dict[str, Any], *, mtp: bool) -> None:
    """Bring the layer schedule to one ratio per main layer and one per MTP block."""
    rates = _nested(values, "compress_rates") or {}
    rates.setdefault("compressed_sparse_attention", values.pop("compress_rate_csa", 4))
    rates.setdefault("heavily_compressed_attention", values.pop("compress_rate_hca", 128))
    if any(_RATIO_OF_LAYER_TYPE.get(kind) != rate for kind, rate in rates.items()):
        raise ConfigError(f"config.json: compress_rates: expected 4 and 128, got {rates}")
    num_layers = _whole(values, "num_hidden_layers", 0)
    ratios = _listed(values, "compress_ratios")
    layer_types = _listed(values, "layer_types")
    if ratios is None and layer_types is not None:
        ratios = [_RATIO_OF_LAYER_TYPE.get(str(t), t) for t in layer_types]
    mlp_types = _listed(values, "mlp_layer_types")
    if mlp_types is not None:
        num_hash = mlp_types.count("hash_moe")
        if mlp_types != ["hash_moe"] * num_hash + ["moe"] * (len(mlp_types) - num_hash):
            raise ConfigError(f"config.json: mlp_layer_types: hash layers must lead: {mlp_types}")
        values.setdefault("num_hash_layers", num_hash)
    if not mtp:
        values["num_nextn_predict_layers"] = 0
        ratios = ratios and ratios[:num_layers]
        for key in [k for k in values if k.startswith("dspark_")]:
            del values[key]
    if ratios is not None:
        if len(ratios) == num_layers:  # transformers lists the main layers only
            ratios += [0] * _whole(values, "num_nextn_predict_layers", 1)
        values["compress_ratios"] = tuple(ratios)


def _whole(values: dict[str, Any], key: str, default: int) -> int:
    """Return a number that other keys depend on; the config itself reports a wrong one."""
    value = values.get(key, default)
    return value if isinstance(value, int) else default


def _read_quantization(raw: dict[str, Any], expert_dtype: str) -> WeightQuantization:
    expected = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
    }
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise ConfigError(
                f"config.json: quantization_config.{key}: expected {value!r}, got {raw[key]!r:.80}"
            )
    inert = {"weight_block_size", "expert_dtype", "modules_to_not_convert", "dequantize"}
    if unknown := sorted(set(raw) - set(expected) - inert):
        raise ConfigError(f"config.json: quantization_config: unknown keys {unknown}")
    block = raw.get("weight_block_size", [128, 128])
    if block not in ([128, 128], (128, 128)):
        raise ConfigError(f"config.json: weight_block_size: expected [128, 128], got {block!r:.80}")
    return WeightQuantization(
        scale_dtype="float32" if expert_dtype == "fp8" else "ue8m0", weight_block_size=(128, 128)
    )

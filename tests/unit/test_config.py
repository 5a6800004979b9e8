"""Presets, the upstream's JSON in every spelling, and errors that list everything (T2, T10b, T18)."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from hadal.config import LayerKind, ModelConfig, to_upstream
from hadal.config.upstream import read_config
from hadal.errors import ConfigError
from tests.configs import CONFIGS, SMALL

SPEC = Path(__file__).parents[3] / "shared" / "spec" / "model-config.json"
PRESETS = {
    "flash": ModelConfig.v4_flash(),
    "pro": ModelConfig.v4_pro(),
    "flash_base": ModelConfig.v4_flash_base(),
    "pro_base": ModelConfig.v4_pro_base(),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_published_files(name):
    if not SPEC.exists():
        pytest.skip(f"{SPEC} is not here")
    published = json.loads(SPEC.read_text())["configs"][name]
    assert ModelConfig.from_upstream(published) == PRESETS[name]


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values(), ModelConfig.nano()])
def test_json_round_trip(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_upstream(config)))
    assert ModelConfig.from_upstream(tmp_path) == config
    assert ModelConfig.from_upstream(tmp_path / "config.json") == config


def test_schedule_of_the_published_models():
    """T2: layers 0 and 1 differ, all even ones from 2 are CSA, all odd ones from 3 HCA."""
    flash, pro = PRESETS["flash"], PRESETS["pro"]
    assert [flash.count(k) for k in LayerKind] == [2, 21, 20]
    assert [pro.count(k) for k in LayerKind] == [0, 30, 31]
    for config in (flash, pro):
        assert all(k is LayerKind.CSA for k in config.layer_kinds[2::2])
        assert all(k is LayerKind.HCA for k in config.layer_kinds[3::2])


def test_every_conflict_is_listed():
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(
            SMALL, o_groups=3, qk_rope_head_dim=15, compress_ratios=(7, 0), bos_token_id=9999
        )
    for part in ("o_groups 3", "qk_rope_head_dim must be even", "expected 0, 4 or 128", "[9999]"):
        assert part in str(caught.value)
    assert "expected 3 entries" in str(caught.value)


@pytest.mark.parametrize("field", ["hidden_size", "index_topk", "hc_eps", "vocab_size"])
def test_numbers_must_be_positive(field):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(SMALL, **{field: 0})


def upstream(**changes):
    return to_upstream(PRESETS["flash"]) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3}, "unknown keys \\['window'\\]"),
        ({"scoring_func": "softmax"}, "scoring_func: expected 'sqrtsoftplus', got 'softmax'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: expected 1, got 8"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "expected 'yarn', got 'linear'"),
        ({"rope_scaling": {"type": "yarn", "mscale": 1}}, "unknown keys \\['mscale'\\]"),
        ({"n_layers": 3}, "n_layers and num_hidden_layers disagree"),
        ({"quantization_config": {"quant_method": "awq"}}, "expected 'fp8', got 'awq'"),
    ],
)
def test_unknown_keys_and_values_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_config(upstream(**changes))


def test_missing_expert_dtype_is_never_guessed():
    """T10b: defaulting to fp4 breaks every FP8 conversion."""
    raw = upstream()
    del raw["expert_dtype"]
    with pytest.raises(ConfigError, match="expert_dtype"):
        read_config(raw)
    assert read_config(raw, expert_dtype="fp8").quantization_config.scale_dtype == "float32"
    assert read_config(raw, expert_dtype="fp4") == PRESETS["flash"]


def test_short_names_of_the_inference_code():
    raw = upstream()
    for short, name in (("dim", "hidden_size"), ("n_layers", "num_hidden_layers")):
        raw[short] = raw.pop(name)
    raw["route_scale"] = raw.pop("routed_scaling_factor")
    assert read_config(raw) == PRESETS["flash"]


def test_dspark_checkpoints_are_recognised():
    """T18: 46 ratios and draft keys belong to a later sibling; its main stack can be read."""
    ratios = [*PRESETS["flash"].compress_ratios, 0, 0]
    raw = upstream(compress_ratios=ratios, dspark_block_size=5, dspark_markov_rank=256)
    with pytest.raises(ConfigError, match="DSpark"):
        read_config(raw)
    main = read_config(raw, mtp=False)
    assert main.layer_kinds == PRESETS["flash"].layer_kinds
    assert main.num_nextn_predict_layers == 0


def test_not_a_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="missing keys"):
        read_config({"hidden_size": 8})


@pytest.mark.parametrize("value", ["4096", None, True, [], {}, 1.5, float("nan"), "x" * 10_000])
@pytest.mark.parametrize("key", [*to_upstream(PRESETS["flash"])])
def test_any_value_of_the_wrong_type_is_named(key, value):
    """No raw TypeError, whatever stands where; a value is accepted only if it fits."""
    fitting = {
        "architectures": True,
        "expert_dtype": False,
        "rope_scaling": value in (None, {}),  # no scaling
        "quantization_config": value in (None, {}),  # {}: all defaults
    }
    fits = fitting.get(key, value in (1.5, True))  # 1.5 is a number, True equals 1
    if fits and key != "architectures":
        with contextlib.suppress(ConfigError):
            read_config(upstream(**{key: value}))
    elif not fits:
        with pytest.raises(ConfigError) as caught:
            read_config(upstream(**{key: value}))
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 0}},
        {"rope_scaling": {"type": "yarn"}},
        {"compress_rope_theta": 1.0},
        {"index_head_dim": 48, "qk_rope_head_dim": 32},
        {"compress_ratios": [[0]] * 44},
        {"compress_rates": {"heavily_compressed_attention": [1]}},
    ],
)
def test_what_would_fail_at_the_first_token_fails_here(changes):
    with pytest.raises(ConfigError):
        read_config(upstream(**changes))


def test_deeply_nested_json(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="not JSON"):
        read_config(tmp_path)


def test_reading_changes_nothing_of_the_callers():
    raw = upstream(compress_rates={"compressed_sparse_attention": 4})
    before = json.dumps(raw)
    read_config(raw)
    assert json.dumps(raw) == before


def test_narrowed_keeps_the_layers():
    small = ModelConfig.v4_pro().narrowed()
    assert small.layer_kinds == ModelConfig.v4_pro().layer_kinds
    assert small.hidden_size < 256

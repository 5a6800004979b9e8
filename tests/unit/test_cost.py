"""Formulas against the modules, and the report's own figures (spec 6)."""

import math
from collections import Counter

import pytest

from hadal.checkpoint import tensor_specs
from hadal.config import ModelConfig
from hadal.cost import CONVENTIONS, KV_FORMATS, estimate, resolve
from hadal.cost.estimate import _weights
from hadal.cost.inventory import Store, inventory
from hadal.errors import ConfigError, InputError
from hadal.model import Transformer, quant, randomize
from tests.configs import CONFIGS

MILLION = (10**6, 2**20)
"""The report does not say which; both round to its figures."""


@pytest.mark.parametrize("context", MILLION)
def test_flops_of_figure_1(context):
    assert round(100 * estimate("v4-pro", context).ratios["flops_of_v3.2"]) == 27
    assert round(100 * estimate("v4-flash", context).ratios["flops_of_v3.2"]) == 10


def test_flops_to_one_more_digit():
    """At 10^6: 27.1 % (3.7x) and 10.2 % (9.8x), as printed."""
    pro, flash = (estimate(n, 10**6) for n in ("v4-pro", "v4-flash"))
    assert f"{1 / pro.ratios['flops_of_v3.2']:.1f}" == "3.7"
    assert f"{1 / flash.ratios['flops_of_v3.2']:.1f}" == "9.8"
    assert f"{pro.ratios['flops_of_v3.2']:.3f}" == "0.271"
    assert f"{flash.ratios['flops_of_v3.2']:.3f}" == "0.102"
    assert pro.flops_per_token == pytest.approx(0.3102e12, rel=1e-3)
    assert flash.flops_per_token == pytest.approx(0.1166e12, rel=1e-3)
    assert estimate("v3.2", 10**6).flops_per_token == pytest.approx(1.1461e12, rel=1e-3)


def test_other_conventions():
    for name, pro, flash in (
        ("raw", 26.2, 12.1),
        ("fp32-parts", 27.1, 10.2),
        ("fp4-as-fp8", 32.1, 13.9),
    ):
        for model, expected in (("v4-pro", pro), ("v4-flash", flash)):
            report = estimate(model, 2**20, convention=name)
            assert 100 * report.ratios["flops_of_v3.2"] == pytest.approx(expected, abs=0.06)


def test_kv_of_figure_1():
    pro, flash = (estimate(n, 2**20) for n in ("v4-pro", "v4-flash"))
    assert (pro.kv_bytes, flash.kv_bytes) == (5_280_404_480, 3_688_172_544)
    assert (pro.kv_bytes_per_token, flash.kv_bytes_per_token) == (5031.4375, 3514.25)
    assert f"{pro.ratios['kv_of_v3.2']:.1%}" == "10.5%"
    assert f"{flash.ratios['kv_of_v3.2']:.1%}" == "7.3%"
    assert f"{pro.ratios['kv_of_gqa8']:.1%}" == "2.0%"
    assert f"{flash.ratios['kv_of_gqa8']:.1%}" == "2.0%"
    assert estimate("v3.2", 2**20).kv_bytes == 50_402_951_168
    assert estimate("gqa8", 2**20).kv_bytes == 261_993_005_056


@pytest.mark.parametrize(
    ("kv_format", "flash", "pro"),
    [("fp8-fp4", 3514.25, 5031.4375), ("fp8-fp8", 3850.25, 5511.4375), ("bf16", 6880, 9848)],
)
def test_kv_formats(kv_format, flash, pro):
    assert estimate("v4-flash", 1, kv_format=kv_format).kv_bytes_per_token == flash
    assert estimate("v4-pro", 1, kv_format=kv_format).kv_bytes_per_token == pro


def test_fixed_state():
    """Rings 3.21 and 4.56 MB, float32 tails 12.2 and 18.7 MB (3.4); MTP ring left out."""
    for name, rings, tails in (
        ("v4-flash", 3_214_336, 12_206_080),
        ("v4-pro", 4_559_872, 18_710_528),
    ):
        report = estimate(name, 1)
        assert sum(k.window_bytes for k in report.kv) == rings
        assert sum(k.tail_bytes for k in report.kv) == tails


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_totals_of_the_published_checkpoints(name):
    report = estimate(name, 1)
    expected = {
        "v4-flash": (284.33, 13.27, 69_187, 159_609_485_896),
        "v4-pro": (1573.00, 48.85, 145_116, 864_704_792_696),
    }[name]
    assert round(report.total_parameters / 1e9, 2) == expected[0]
    assert round(report.active_parameters / 1e9, 2) == expected[1]
    assert (report.num_tensors, sum(report.weight_bytes.values())) == expected[2:]


@pytest.mark.parametrize("kind", [None, "instruct", "base"])
@pytest.mark.parametrize("name", ["flash_like", "pro_like", "nano"])
def test_inventory_is_the_modules(name, kind):
    """Same shapes, same number of each, same bytes: formulas cannot drift from the code."""
    config = ModelConfig.nano() if name == "nano" else CONFIGS[name]
    config = config.quantized(kind) if kind else config
    specs = tensor_specs(config)
    weights = _weights(config)
    assert weights["num_tensors"] == len(specs)
    assert sum(weights["weight_bytes"].values()) == sum(s.num_bytes for s in specs.values())
    plain = {n: s.shape for n, s in tensor_specs(config.plain()).items()}
    expected = Counter(shape for n, shape in plain.items())
    found = Counter()
    for group in inventory(config):
        found[group.shape] += group.count
    assert found == expected
    main = sum(
        math.prod(s)
        for n, s in plain.items()
        if not n.startswith("mtp.") and not n.endswith("tid2eid")
    )
    assert weights["total_parameters"] == main


def test_entry_sizes_are_those_of_the_quantisers():
    for config in (ModelConfig.v4_pro(), ModelConfig.nano(), CONFIGS["flash_like"]):
        kv_format = KV_FORMATS["fp8-fp4"]
        assert kv_format.entry_bytes(config) == quant.kv_entry_bytes(
            config.head_dim, config.qk_rope_head_dim
        )
        assert kv_format.index_bytes(config) == quant.index_key_bytes(config.index_head_dim)


def test_reference_cache_has_the_bytes_of_the_formula():
    """A real cache, float32: entries and window to the byte; tails at their mean are less."""
    import torch

    model = Transformer(CONFIGS["flash_like"])
    randomize(model, 0)
    cache = model.new_cache()
    model(torch.zeros(1024).long(), [1024], [cache])
    from hadal.cost.kv import kv_by_kind

    layers = kv_by_kind(model.config, 1024, KV_FORMATS["fp32"])
    entries = sum(len(c.entries) * 32 + len(c.index_keys) * 32 for c in cache.layers) * 4
    assert entries == sum(k.entries_bytes for k in layers)
    windows = sum(c.window.numel() * 4 for c in cache.layers)
    per_key = 5 * 32 * 4  # the current token's key is not kept
    assert windows + per_key == sum(k.window_bytes for k in layers)


def test_multiplied_matrices_only():
    """Embedding, positional biases and hash tables are looked up or added."""
    for group in inventory(ModelConfig.v4_flash()):
        if group.multiplied:
            assert len(group.shape) == 2
            assert group.store is not Store.INT64


def test_window_only_network_grows_by_nothing(tmp_path):
    import json

    from hadal.config import to_upstream

    (tmp_path / "config.json").write_text(json.dumps(to_upstream(CONFIGS["window_only"])))
    report = estimate(str(tmp_path), 1000)
    assert report.kv_bytes_per_token == 0
    assert report.kv_bytes > 0


def test_names_and_errors():
    assert resolve("pro") == resolve("DeepSeek-V4-Pro") == ModelConfig.v4_pro()
    with pytest.raises(ConfigError, match="unknown model 'v5'"):
        resolve("v5")
    with pytest.raises(InputError, match="at least 1 token"):
        estimate("nano", 0)
    with pytest.raises(InputError, match="'fast' is not one of"):
        estimate("nano", 1, convention="fast")
    assert all(c.text for c in CONVENTIONS.values())

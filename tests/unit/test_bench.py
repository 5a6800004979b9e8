"""Benchmarks run, their figures are there and their JSON is whole; times are never judged."""

import json
import sys

import pytest

from hadal.bench.context import Samples, StoppedError, measure, run_prompt
from hadal.bench.side import SideProcess
from hadal.bench.work import decode_bytes, prefill_flops
from hadal.cli.main import app
from hadal.config import ModelConfig
from hadal.cost.flops import flops_per_token
from hadal.errors import EngineError, InputError

# Does nothing with its tokens, and needs no torch to start.
COUNTING = """
import time
from hadal.bench.side import serve

class Counting:
    def start(self, ids, new):
        self.total, self.done = len(ids), 0

    def step(self):
        time.sleep(0.001)
        self.done = self.done + 1 if self.done >= self.total else min(self.done + 512, self.total)
        return self.done, None if self.done < self.total else self.done

serve(Counting())
"""


def test_context_beside_transformers(capsys):
    arguments = "bench context --lengths 8,0.0234375k --rounds 2 --new 3 --json"
    app([*arguments.split(), "--peer", "transformers-fp32"], result_action="return_value")
    report = json.loads(capsys.readouterr().out)
    assert "prompts of 8, 24 tokens" in report["workload"]
    found = report["figures"]
    for length in (8, 24):
        for side in ("hadal-fp32", "transformers-fp32"):
            for figure in ("prefill, tokens/s", "decode, ms a token"):
                spread = found[f"{length}: {side}: {figure}"]
                assert spread["rounds"] == 2
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            for figure in ("prefill, share of limit", "decode, share of limit"):
                assert 0 < found[f"{length}: {side}: {figure}"] < 1
            assert found[f"{length}: {side}: memory over the weights, MB"] < 1000
        assert found[f"{length}: hadal over transformers-fp32: decode time"]["low"] > 0
        same = found[f"{length}: transformers-fp32: greedy tokens equal to hadal's"]
        assert same == "6 of 6"
    for limit in ("fp32_gflops", "bf16_gflops", "copy_gbps"):
        assert found[f"limit: {limit}"]["rounds"] == 4
    assert any(note.startswith("goals, W1") for note in report["notes"])


def test_a_prompt_is_run_in_steps():
    samples = Samples()
    with SideProcess([sys.executable, "-c", COUNTING]) as side:
        for _ in range(2):
            run_prompt(side, [0] * 1000, 4, None, samples)
    assert samples.tokens == [[1000, 1001, 1002, 1003]] * 2
    assert all(s >= 0.002 for s in samples.prefill_s)
    assert all(ms >= 1 for ms in samples.decode_ms)
    assert all(mb < 10 for mb in samples.peak_mb)


def test_a_side_that_would_take_too_long_is_stopped():
    with (
        SideProcess([sys.executable, "-c", COUNTING]) as side,
        pytest.raises(StoppedError, match="stopped after 512 of them in 0 s"),
    ):
        run_prompt(side, [0] * 512_000, 2, 0.5, Samples())


def test_context_refuses_what_measures_nothing():
    with pytest.raises(InputError):
        measure("nano", [], 2, 1)
    with pytest.raises(InputError):
        measure("nano", [16], 1, 1)


def test_a_side_that_ends_says_why():
    with (
        SideProcess([sys.executable, "-c", "import sys; sys.exit('no such network')"]) as side,
        pytest.raises(EngineError, match="code 1: no such network"),
    ):
        side.ask({"step": None})


def test_prefill_flops_are_the_sum_over_positions():
    config = ModelConfig.nano()
    exact = sum(
        f.count for n in range(3000) for f in flops_per_token(config, n) if f.part != "head"
    )
    head = next(f.count for f in flops_per_token(config, 0) if f.part == "head")
    assert prefill_flops(config, 3000) == pytest.approx(exact + head, rel=1e-3)


def test_decode_bytes_grow_by_what_is_read():
    config = ModelConfig.nano()
    short, long = (decode_bytes(config, n) for n in (64 * 1024, 128 * 1024))
    # Chosen entries are as many at both; index keys and HCA entries are twice as many.
    per_token = 4 * (
        config.layer_kinds.count("csa") * config.index_head_dim / 4
        + config.layer_kinds.count("hca") * config.head_dim / 128
    )
    assert long - short == pytest.approx(64 * 1024 * per_token)
    assert decode_bytes(config, 1024, bits=16) == pytest.approx(decode_bytes(config, 1024) / 2)
    assert decode_bytes(config, 1024, expert_bits=4.25) < decode_bytes(config, 1024)

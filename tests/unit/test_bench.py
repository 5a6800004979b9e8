"""Benchmarks run, their figures are there and their JSON is whole; times are never judged."""

import json
import os
import struct
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from hadal.bench import llama_cpp_peer
from hadal.bench.context import Samples, StoppedError, measure, run_prompt
from hadal.bench.gguf import metadata, mxfp4_blocks, write_gguf
from hadal.bench.prefix import measure as prefix
from hadal.bench.side import SideProcess
from hadal.bench.work import decode_bytes, prefill_flops
from hadal.cli.main import app
from hadal.config import ModelConfig
from hadal.cost.flops import flops_per_token
from hadal.errors import EngineError, InputError
from hadal.model import Transformer
from hadal.model.quant import fake_quantize_fp4

# Does nothing with its tokens, and needs no torch to start.
COUNTING = """
import time
from hadal.bench.gguf import metadata, mxfp4_blocks, write_gguf
from hadal.bench.prefix import measure as prefix
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


@pytest.fixture
def threads():
    """How many threads the process had before, which it has again afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_context_beside_transformers(capsys):
    arguments = (
        "bench context --lengths 8,0.0234375k --rounds 2 --new 3 --threads 1 --clock cpu --json"
    )
    app([*arguments.split(), "--peer", "transformers-fp32"], result_action="return_value")
    report = json.loads(capsys.readouterr().out)
    assert "1 threads" in report["machine"]
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
        assert found[f"{length}: hadal-fp32 over transformers-fp32: decode time"]["low"] > 0
        same = found[f"{length}: transformers-fp32: greedy tokens equal to hadal-fp32's"]
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


def test_prefix_says_what_was_reused_and_which_peer_was_not_run():
    report = prefix("nano", 128, 1, 1).to_json()
    found = report["figures"]
    for state in ("cold", "memory", "resent", "disk", "restart"):
        assert found[f"{state}: seconds to the first token"]["rounds"] == 1
    assert found["answers that differ from cold"] == 0
    assert found["hits that are not the shared blocks"] == 0
    assert any(note.startswith("llama.cpp was not run") for note in report["notes"])


def test_a_peer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        prefix("nano", 128, 1, 1, llama_cpp=tmp_path / "python")


def test_mxfp4_blocks_hold_the_same_values():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    blocks = mxfp4_blocks(weight).unflatten(-1, (-1, 17))
    codes = torch.cat((blocks[..., 1:] & 0xF, blocks[..., 1:] >> 4), dim=-1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(codes & 7).long()]
    signed = torch.where(codes > 7, -values, values)
    found = signed * 2.0 ** (blocks[..., :1].float() - 127)
    assert torch.equal(found.flatten(-2), fake_quantize_fp4(weight))


def test_gguf_holds_every_tensor_once(tmp_path):
    model = Transformer(ModelConfig.nano())
    write_gguf(model, tmp_path / "nano.gguf")
    data = (tmp_path / "nano.gguf").read_bytes()
    magic, version, num_tensors, num_fields = struct.unpack_from("<4sIQQ", data)
    assert (magic, version, num_fields) == (b"GGUF", 3, len(metadata(model.config)))
    kept = [n for n in model.state_dict() if not n.startswith("mtp.")]
    experts = [n for n in kept if ".experts." in n]
    assert num_tensors == len(kept) - len(experts) + 3 * model.config.num_hidden_layers
    assert b"blk.0.ffn_gate_tid2eid.weight" in data
    head = model.head.weight.detach().numpy().tobytes()
    assert data.find(head) % 32 == 0


@pytest.mark.skipif("HADAL_LLAMA_CPP" not in os.environ, reason="HADAL_LLAMA_CPP names no Python")
def test_llama_cpp_computes_the_same_network():
    python = Path(os.environ["HADAL_LLAMA_CPP"])
    with ExitStack() as stack:
        side = llama_cpp_peer.start(stack, python, "nano")
        found = llama_cpp_peer.agreement(side, "nano", 256)
        samples = Samples()
        run_prompt(side, list(range(2, 600)), 3, None, samples, "cpu")
    assert found["rms error"] < 0.2 * found["standard deviation of the logits"]
    assert found["share of equal argmaxes"] > 0.75
    assert len(samples.tokens[0]) == 3
    report = prefix("nano", 128, 1, 1, llama_cpp=python)
    assert report.figures["llama.cpp, resent over cold"].median > 0
    assert report.figures["llama.cpp, memory: largest difference of a logit from cold"] < 1

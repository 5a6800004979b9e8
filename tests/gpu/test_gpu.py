"""The same code on a GPU: the model, the engine and training do there what they do on a processor."""

import copy

import pytest
import torch

from hadal.checkpoint import load
from hadal.engine import LLM, SamplingParams
from hadal.model import ModelConfig, Transformer, logits, randomize
from hadal.model.training import training_forward
from hadal.nano import nano_checkpoint
from hadal.train.trainer import Trainer
from tests.configs import CONFIGS
from tests.engine.fixtures import cached_reference, model_of, prompts
from tests.train.test_training_run import config, data, encoding, losses  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ROUNDING = 1e-4
"""Of float32 products that are summed in another order, through all layers."""


def on_gpu(name):
    return copy.deepcopy(model_of(name)).cuda()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits(name):
    ids = prompts(3, 150, 600, vocab=CONFIGS[name].vocab_size)
    expected = logits(model_of(name), ids)
    for one, other in zip(logits(on_gpu(name), ids), expected, strict=True):
        assert one.is_cuda
        assert (one.cpu() - other).abs().max() <= ROUNDING * other.abs().max()


@pytest.mark.parametrize("drafts", [0, 1])
def test_engine(drafts, tmp_path):
    """Batched, chunked, from memory and from disk: the tokens of the model with its own cache, on the GPU."""
    model = on_gpu("small_stack")
    asked = prompts(6, 20, 700)
    expected = [gpu_reference(model, ids, 24) for ids in asked]
    params = SamplingParams(max_tokens=24, temperature=0.0)
    settings = {
        "max_num_batched_tokens": 256,
        "max_model_len": 1024,
        "num_speculative_tokens": drafts,
    }
    for _ in range(2):
        llm = LLM(model, disk_path=tmp_path / "cache", **settings)
        for _ in range(2):
            found = llm.generate(asked, params)
            assert [list(done.token_ids) for done in found] == expected
        llm.engine.close()
    assert found[0].prefix.hit > 0


def gpu_reference(model, ids, count):
    cache, out = model.new_cache(), []
    with torch.no_grad():
        row = model(torch.tensor(ids).cuda(), [len(ids)], [cache])[-1]
        for _ in range(count):
            out.append(int(row.argmax()))
            row = model(torch.tensor(out[-1:]).cuda(), [1], [cache])[-1]
    return out


def test_nano_as_stored():
    """FP4 experts, FP8 weights and entries: what the checkpoint says on a processor, it says here."""
    ids = prompts(1, 900, 900, vocab=2048)[0]
    expected = cached_reference(load(nano_checkpoint()), ids, 1)
    llm = LLM(nano_checkpoint(), device="cuda", max_model_len=2048)
    [done] = llm.generate([ids], SamplingParams(max_tokens=1, temperature=0.0))
    assert list(done.token_ids) == expected


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("length", [700, 9000])
def test_losses(stage, length):
    """Of one sample, also of one that is long enough to be computed twice; gradients to their rounding."""
    nano = Transformer(ModelConfig.nano())
    randomize(nano, 0)
    found = []
    for model in (nano, copy.deepcopy(nano).cuda()):
        ids = torch.tensor(prompts(1, length, length)[0], device=model.device)
        output = training_forward(model, ids, [length], indexer_stage=stage, fast=True)
        total = output.language + output.mtp + output.indexer + output.balance
        gradients = torch.autograd.grad(total, [model.embed.weight, model.head.weight])
        found.append((total.item(), [g.cpu() for g in gradients]))
    (one, ones), (other, others) = found
    assert one == pytest.approx(other, rel=1e-4)
    for a, b in zip(ones, others, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_training_goes_on_bit_for_bit(data, tmp_path):  # noqa: F811
    settings = {"device": "cuda", "quantize_from": 0.7, "sparse_from": 0.4}
    whole = Trainer(config(tmp_path, **settings), data)
    whole.run()
    parts = tmp_path / "parts"
    parts.mkdir()
    first = Trainer(config(parts, **settings), data)
    for _ in range(3):
        first.take_step()
    first.save()
    again = Trainer(config(parts, **settings), data)
    assert again.resume()
    again.run()
    assert losses(parts) == losses(tmp_path)[3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name

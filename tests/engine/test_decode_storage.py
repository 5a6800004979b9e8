"""Entries that the library writes into the cache's blocks itself, in every format, are what the modules would have written."""

import dataclasses

import pytest
import torch

from hadal.engine import Engine, EngineConfig, SamplingParams
from hadal.engine.paged_cache import PagedEntries, SequenceBlocks
from hadal.engine.storage_format import Codec
from hadal.model import ModelConfig, Precision, Transformer, randomize
from hadal.model import transformer as transformer_module
from hadal.model.decode import one_token_each
from hadal.model.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")

CONFIG = dataclasses.replace(ModelConfig.nano(), quantization_config=None)
CASES = [
    (torch.float32, Precision.exact(), "fp32"),
    (torch.bfloat16, Precision.exact(), "fp32"),
    (torch.bfloat16, Precision.exact(), "bf16"),
    (torch.float32, Precision.published(), "fp8-fp4"),
    (torch.bfloat16, Precision.published(), "fp8-fp4"),
]


def generated(model, cache_format):
    """Tokens of two requests, all that their blocks hold, and their windows and tails."""
    settings = EngineConfig(cache_format=cache_format, max_model_len=512, cache_bytes=16 << 20)
    engine = Engine(model, settings)
    storage = engine.cache._storage
    for pages, _ in storage.pages.values():
        pages.zero_()
    greedy = SamplingParams(temperature=0.0, max_tokens=140, ignore_eos=True)
    draw = torch.Generator().manual_seed(5)
    for length in (100, 230):
        engine.add(torch.randint(2, CONFIG.vocab_size, (length,), generator=draw).tolist(), greedy)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens, [pages.clone() for pages, _ in storage.pages.values()]


@pytest.mark.parametrize(("dtype", "precision", "cache_format"), CASES)
def test_blocks_hold_what_the_modules_write(monkeypatch, dtype, precision, cache_format):
    model = Transformer(CONFIG, dtype=dtype, precision=precision)
    randomize(model, seed=3)
    calls = []

    def counted(*arguments):
        calls.append(one_token_each(*arguments))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(transformer_module, "one_token_each", counted)
        found = generated(model, cache_format)
    assert sum(out is not None for out in calls) >= 139
    monkeypatch.setattr(transformer_module, "one_token_each", lambda *_: None)
    expected = generated(model, cache_format)
    assert found[0] == expected[0]
    assert all(bool(pages.any()) for pages in expected[1])
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize(
    ("sealed", "count", "has"), [(0, 0, True), (1, 31, False), (1, 32, True), (0, 64, False)]
)
def test_rows_are_written_to_blocks_of_the_sequence_only(sealed, count, has):
    """Neither to one that is shared, nor to one that nobody has reserved."""
    blocks = SequenceBlocks(torch.device("cpu"), [3, 1], num_sealed=sealed)
    codec = Codec(width=16, dtype=torch.float32, packing="plain", row=16, rope=0)
    store = PagedEntries(torch.zeros(4, 32, 16), codec, blocks, torch.float32, count)
    found = store.with_room(32, 16, torch.float32)
    assert (found is not None) == has
    assert found is None or found is store.pages()


def test_an_engine_takes_a_model_as_it_is_then():
    """Also where a pass of single tokens, before, has left tables of other parameters."""
    models = [Transformer(CONFIG, precision=Precision.exact()) for _ in range(2)]
    for seed, model in enumerate(models):
        randomize(model, seed=seed)
    first, second = models
    with torch.no_grad():
        cache = first.new_cache()
        for ids in (torch.arange(2, 140), torch.tensor([5])):
            first(ids, [len(ids)], [cache])
    for name, parameter in second.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(first.get_submodule(owner), own, torch.nn.Parameter(parameter.detach().clone()))
    for name, buffer in second.named_buffers():
        first.get_buffer(name).copy_(buffer)
    assert generated(first, "fp32")[0] == generated(second, "fp32")[0]

"""Steps of one token a sequence, whose layers are two calls of the library each: to the last bit what the modules do."""

import copy
import dataclasses

import pytest
import torch

from hadal.model import ModelConfig, Precision, Transformer, randomize
from hadal.model import block as block_module
from hadal.model.kernels import native, without_kernels
from hadal.model.one_token import one_token_each
from hadal.model.tape import Tape

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")

CONFIG = dataclasses.replace(ModelConfig.nano(), quantization_config=None)
CASES = [
    pytest.param((dtype, precision()), id=f"{dtype}-{name}".removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16)
    for name, precision in (("exact", Precision.exact), ("published", Precision.published))
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=CASES)
def model(request):
    dtype, precision = request.param
    made = Transformer(CONFIG, dtype=dtype, precision=precision)
    randomize(made, seed=3)
    return made


@pytest.fixture
def exact():
    made = Transformer(CONFIG, precision=Precision.exact())
    randomize(made, seed=3)
    return made


@pytest.fixture
def used(monkeypatch):
    """How many layers were two calls, and how many were not."""
    counts = {True: 0, False: 0}

    def counted(*arguments):
        found = one_token_each(*arguments)
        counts[found is not None] += 1
        return found

    monkeypatch.setattr(block_module, "one_token_each", counted)
    return counts


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, CONFIG.vocab_size, (count,), generator=generator)


def decoded(model, ids, caches, steps):
    """Logits of steps of one token for each cache, and what the caches are behind them."""
    logits = [model(ids[step], [1] * len(caches), caches) for step in range(steps)]
    return torch.stack(logits), [t for c in caches for slot in c.slots() for t in slot.tensors()]


def begun(model):
    """Two sequences, behind prompts of different lengths."""
    caches = [model.new_cache(), model.new_cache()]
    model(tokens(300), [190, 110], caches)
    return caches


def test_bits_are_those_of_the_modules(model, monkeypatch, used):
    ids = tokens(280, seed=1).view(140, 2)
    found = decoded(model, ids, begun(model), 140)  # past a window of 128
    assert used[True] == 140 * len(model.blocks)
    monkeypatch.setattr(block_module, "one_token_each", lambda *_: None)
    expected = decoded(model, ids, begun(model), 140)
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


def test_what_is_not_one_token_is_left_to_the_modules(exact, used):
    caches = begun(exact)
    used[True] = used[False] = 0
    exact(tokens(3), [1, 2], caches)
    caches[0].rewindable = True
    exact(tokens(2), [1, 1], caches)
    with without_kernels():
        exact(tokens(2), [1, 1], caches)
    with torch.enable_grad():
        exact(tokens(2), [1, 1])
    assert used[True] == 0
    assert used[False] == 4 * len(exact.blocks)


def test_snapshots_and_slots_stay_as_they_were(exact):
    """Two futures of one past: what one of them takes up is not seen by the other."""
    ids = tokens(60, seed=2).view(60, 1)
    (cache, _) = begun(exact)
    decoded(exact, ids, [cache], 10)
    before, slots = cache.snapshot(), cache.slots()
    kept = [tensor.clone() for slot in slots for tensor in slot.tensors()]
    first, _ = decoded(exact, ids[10:], [cache], 30)
    assert all(map(torch.equal, [t for slot in slots for t in slot.tensors()], kept))
    cache.restore(before)
    assert all(map(torch.equal, [t for slot in cache.slots() for t in slot.tensors()], kept))
    other, _ = decoded(exact, ids[30:], [cache], 10)
    cache.load_slots(slots, before.num_tokens)
    for layer, (_, entries, keys) in zip(cache.layers, before.layers, strict=True):
        layer.entries.truncate(entries)
        layer.index_keys.truncate(keys)
    again, _ = decoded(exact, ids[10:], [cache], 30)
    assert torch.equal(again, first)
    assert not torch.equal(other, first[:10])


def test_a_copy_of_a_cache_goes_its_own_way(exact):
    ids = tokens(40, seed=3).view(40, 1)
    (cache, _) = begun(exact)
    decoded(exact, ids, [cache], 6)
    twin = copy.deepcopy(cache)
    decoded(exact, ids[20:], [twin], 10)
    found, _ = decoded(exact, ids[6:], [cache], 10)
    (fresh, _) = begun(exact)
    expected, _ = decoded(exact, ids, [fresh], 16)
    assert torch.equal(found, expected[6:])


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_call_that_fails_changes_nothing(exact, monkeypatch, steps):
    ids = tokens(30, seed=4).view(30, 1)
    (cache, _) = begun(exact)
    decoded(exact, ids, [cache], steps)
    call, left = native.call, [5]

    def failing(name, *arguments, **options):
        left[0] -= name.startswith("hadal_block")
        if left[0] < 0:
            raise MemoryError(name)
        return call(name, *arguments, **options)

    monkeypatch.setattr("hadal.model.kernels.blocks.call", failing)
    with pytest.raises(MemoryError):
        exact(ids[20], [1], [cache])
    left[0] = 1 << 30
    found, _ = decoded(exact, ids[steps:], [cache], 8)
    (fresh, _) = begun(exact)
    assert torch.equal(found, decoded(exact, ids, [fresh], steps + 8)[0][steps:])


def test_a_tape_is_written_behind_what_it_has():
    tape = Tape(torch.arange(6.0).view(3, 2), room=2)
    window = tape.last(2)
    assert tape.push() == tape.address(1) == window.data_ptr() + 2 * 8
    tape.last(1).fill_(7.0)
    assert window.tolist() == [[2, 3], [4, 5]]
    assert tape.last(9).tolist() == [[0, 1], [2, 3], [4, 5], [7, 7]]
    assert not tape.is_full
    tape.push()
    assert tape.is_full

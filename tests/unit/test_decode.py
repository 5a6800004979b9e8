"""Steps of one token a sequence, all of whose layers are one call of the library: to the last bit what the modules do."""

import copy
import ctypes
import dataclasses
import time

import pytest
import torch

from hadal.model import ModelConfig, Precision, Transformer, randomize
from hadal.model import transformer as transformer_module
from hadal.model.compressor import Tail
from hadal.model.decode import one_token_each
from hadal.model.kernels import native, without_kernels
from hadal.model.kernels.decode import PARTS, timed_parts
from hadal.model.tape import Ring

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
    """How many calls of the model were one of the library, and how many were not."""
    counts = {True: 0, False: 0}

    def counted(*arguments):
        found = one_token_each(*arguments)
        counts[found is not None] += 1
        return found

    monkeypatch.setattr(transformer_module, "one_token_each", counted)
    return counts


def memory(address, count):
    """So many floats where they lie."""
    return (ctypes.c_float * count).from_address(address)


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
    assert used[True] == 140
    monkeypatch.setattr(transformer_module, "one_token_each", lambda *_: None)
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
    assert used[False] == 4


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
    call = native.call

    def failing(name, *arguments, **options):
        call(name, *arguments, **options)  # what has been written by then is not counted
        raise MemoryError(name)

    with monkeypatch.context() as patch:
        patch.setattr("hadal.model.kernels.decode.call", failing)
        with pytest.raises(MemoryError):
            exact(ids[20], [1], [cache])
    found, _ = decoded(exact, ids[steps:], [cache], 8)
    (fresh, _) = begun(exact)
    assert torch.equal(found, decoded(exact, ids, [fresh], steps + 8)[0][steps:])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_ring_holds_the_unfinished_window_and_the_one_before(overlap):
    rate, width = 4, 3
    rows = torch.randn(20, 2 * width if overlap else width)
    tail = Tail.fresh(rate, width, overlap=overlap, device=torch.device("cpu"))
    tail = tail.advance(rows[:6], -rows[:6])
    ring = Ring(tail, 6)
    keys, logits = (
        torch.frombuffer(
            memory(address, (2 if overlap else 1) * rate * rows.shape[1]), dtype=torch.float32
        )
        for address in ring.addresses()
    )
    for position in range(6, 20):
        expected = tail.advance(rows[6:position], -rows[6:position])
        found = ring.tail_at(position)
        for name in ("kv", "gate", "previous_kv", "previous_gate"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), (position, name)
        slot = position % (2 * rate if overlap else rate) * rows.shape[1]
        keys[slot : slot + rows.shape[1]] = rows[position]
        logits[slot : slot + rows.shape[1]] = -rows[position]


def test_what_parts_take_is_counted_where_somebody_asks(exact):
    (cache, _) = begun(exact)
    ids = tokens(6, seed=6).view(6, 1)
    begin = time.perf_counter()
    with timed_parts() as spent:
        decoded(exact, ids, [cache], 3)
    whole = time.perf_counter() - begin
    found = dict(zip(PARTS, spent, strict=True))
    assert found.pop("index") >= 0  # of entries that are all seen there is no choice
    assert all(seconds > 0 for seconds in found.values())
    assert sum(spent) < whole
    before = list(spent)
    decoded(exact, ids[3:], [cache], 3)
    assert list(spent) == before

"""Bad input gets a named error with expected and actual, and changes nothing."""

import dataclasses

import pytest
import torch

from hadal.errors import ContextLengthError, InputError
from hadal.model import Trace, Transformer, logits, randomize, training_forward
from hadal.model.rope import inverse_frequencies
from tests.configs import CONFIGS, schedule


@pytest.fixture(scope="module")
def model():
    model = Transformer(dataclasses.replace(CONFIGS["flash_like"], max_position_embeddings=64))
    randomize(model, 0)
    return model


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (torch.zeros(3), [3], r"expected a flat int64 or int32 tensor .* got torch.float32 \[3\]"),
        (torch.zeros(1, 3).long(), [3], r"got torch.int64 \[1, 3\]"),
        (torch.zeros(3).long(), [2], r"lengths \[2\] add up to 2, but there are 3"),
        (torch.zeros(3).long(), [3, 0], "positive numbers"),
        (torch.tensor([1, -1, 2]), [3], r"expected 0..511, got -1..2"),
        (torch.tensor([1, 512, 2]), [3], r"expected 0..511, got 1..512"),
    ],
)
def test_wrong_ids_and_lengths(model, ids, lengths, message):
    """T13: a padding id of -1 would index the hash table from behind."""
    with pytest.raises(InputError, match=message):
        model(ids, lengths)


def test_context_length(model):
    cache = model.new_cache()
    model(torch.zeros(60).long(), [60], [cache])
    with pytest.raises(ContextLengthError) as caught:
        model(torch.zeros(5).long(), [5], [cache])
    assert (caught.value.limit, caught.value.actual) == (64, 65)
    assert cache.num_tokens == 60
    model(torch.zeros(4).long(), [4], [cache])


def test_wrong_caches(model):
    ids, cache = torch.zeros(2).long(), model.new_cache()
    with pytest.raises(InputError, match="expected 2 different ones, got 2, of which 1 differ"):
        model(ids, [1, 1], [cache, cache])
    with pytest.raises(InputError, match="expected 2 different ones, got 1"):
        model(ids, [1, 1], [cache])
    with pytest.raises(
        InputError, match=r"expected 5 layers of this model in torch\.float32, got 1 layers"
    ):
        model(ids, [2], [model.new_draft_cache()])
    with pytest.raises(
        InputError, match=r"expected 1 layers of this model in torch\.float32, got 5 layers"
    ):
        model.draft(torch.zeros(2, 4, 64), ids, [2], [cache])


def test_draft_errors(model):
    with pytest.raises(InputError, match="MTP block 1: the model has 1"):
        model.draft(torch.zeros(2, 4, 64), torch.zeros(2).long(), [2], mtp_idx=1)
    with pytest.raises(InputError, match=r"expected streams \[2, 4, 64\], got \[3, 4, 64\]"):
        model.draft(torch.zeros(3, 4, 64), torch.zeros(2).long(), [2])


def test_a_failure_in_the_middle_leaves_the_cache_as_it_was(model):
    cache, clean = model.new_cache(), model.new_cache()
    ids = torch.randint(0, 512, (40,))
    for state in (cache, clean):
        model(ids[:30], [30], [state])
    last = model.blocks[-1]
    handle = last.ffn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[30:], [10], [cache])
    handle.remove()
    assert torch.equal(model(ids[30:], [10], [cache]), model(ids[30:], [10], [clean]))


def test_snapshots_of_another_time_or_cache_are_refused(model):
    cache, other = model.new_cache(), model.new_cache()
    first = cache.snapshot()
    model(torch.zeros(9).long(), [9], [cache])
    second = cache.snapshot()
    cache.restore(second)
    cache.restore(first)
    for snapshot, state in ((second, cache), (first, other)):
        with pytest.raises(InputError, match="does not lie in the past"):
            state.restore(snapshot)


def test_caches_record_no_gradients(model):
    ids = torch.zeros(3).long()
    assert model(ids, [3]).requires_grad
    assert not model(ids, [3], [model.new_cache()]).requires_grad
    streams = model.streams(ids, [3], [model.new_cache()])
    assert not streams.requires_grad
    assert not model.draft(streams, ids, [3], [model.new_draft_cache()])[0].requires_grad


def test_many_steps_leave_nothing_behind(model):
    cache = model.new_cache()
    for _ in range(20):
        model(torch.zeros(1).long(), [1], [cache])
    assert cache._live == []


def test_leaving_inference_mode(model):
    """A prefill served in inference mode can be continued outside of it."""
    ids, caches = torch.randint(0, 512, (60,)), [model.new_cache() for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(ids[:30], [30], [cache])
            model(ids[30:41], [11], [cache])
        expected = model(ids[41:], [19], caches[:1])
    with torch.no_grad():
        assert torch.equal(model(ids[41:], [19], caches[1:]), expected)


def test_default_device_and_dtype_do_not_matter():
    config = schedule(0, 4, 128, compress_rope_theta=54_321.0)
    expected = Transformer(config)(torch.arange(300), [300])
    with torch.device("meta"):
        inverse_frequencies(16, 54_322.0, config.rope_scaling)
    assert inverse_frequencies(16, 54_322.0, config.rope_scaling).device.type == "cpu"
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = Transformer(config)
        assert again.embed.weight.dtype == torch.float32
        assert torch.equal(again(torch.arange(300), [300]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([1, 2], [2], "token ids as a tensor .* got list"),
        (torch.zeros(2).long(), [2.0], r"whole numbers, got Tensor and \[2.0\]"),
        (torch.zeros(0).long(), [], "at least one sequence"),
    ],
)
def test_things_that_are_no_batch(model, ids, lengths, message):
    with pytest.raises(InputError, match=message):
        model(ids, lengths)


def test_words_that_mean_nothing():
    with pytest.raises(InputError, match="'plain' or 'checkpoint', got 'checkpiont'"):
        Transformer(schedule(0), storage="checkpiont")
    with pytest.raises(InputError, match="'dense', 'sparse' or None, got 'warm'"):
        Trace(indexer_stage="warm")


def test_a_trace_is_of_one_pass(model):
    ids, trace = torch.zeros(20).long(), Trace()
    model(ids, [20], trace=trace)
    with pytest.raises(InputError, match="recorded already"):
        model(ids, [20], trace=trace)
    with pytest.raises(InputError, match="no recorded pass"):
        model(ids, [20], trace=Trace(replaying=True))


def test_caches_of_another_dtype_or_kind_are_refused(model):
    rounded = Transformer(CONFIGS["flash_like"], dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"in torch\.float32, got 5 layers in torch\.bfloat16"):
        model(torch.zeros(2).long(), [2], [rounded.new_cache()])
    one = Transformer(schedule(4))
    with pytest.raises(InputError, match="hint: forward takes"):
        one(torch.zeros(2).long(), [2], [one.new_draft_cache()])


def test_empty_list_of_sequences(model):
    assert logits(model, []) == []


def test_bfloat16_runs_and_stays_close():
    config = schedule(0, 128)
    exact, rounded = Transformer(config), Transformer(config, dtype=torch.bfloat16)
    randomize(exact, 0)
    randomize(rounded, 0)
    ids = torch.randint(0, 512, (200,))
    error = logits(rounded, [ids])[0] - logits(exact, [ids])[0]
    assert 0 < error.square().mean().sqrt() < 0.05


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3).long(), r"shape \[4\], got torch.int64 \[3\]"),
        (torch.zeros(4), "expected integers"),
        (torch.tensor([0, 1, 512, -100]), r"expected 0..511 or -100, got 0..512"),
    ],
)
def test_labels_are_checked(model, labels, message):
    with pytest.raises(InputError, match=message):
        training_forward(model, torch.zeros(4).long(), [4], labels_T=labels)

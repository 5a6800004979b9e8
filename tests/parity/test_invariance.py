"""One sequence, however it is cut and whatever it is batched with (issue: lines 2 and 5).

The goal is 1e-5 in float32. The arithmetic is built so that nothing differs at all (product.py,
elementwise.py): anything above zero would flip near-ties of the indexer sooner or later, with
errors of 0.1 and more.
"""

import pytest
import torch

from hadal.errors import InputError
from hadal.model import SequenceCache, Trace, Transformer, logits, randomize
from hadal.model.indexer import index_scores
from hadal.model.rope import rotation
from tests.configs import CONFIGS, schedule

TOLERANCE = 1e-5
CHUNKINGS = {
    "halves": [1025],
    "blocks": [128],
    "off_by_one": [127, 129],
    "ragged": [7, 50, 1, 100, 13, 29],
    "tiny": [1, 2, 3, 4, 5],
}


def random_model(name: str, seed: int = 0) -> Transformer:
    model = Transformer(CONFIGS[name])
    randomize(model, seed)
    return model


def tokens(model: Transformer, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator)


def run(model, ids, sizes, cache: SequenceCache | None = None):
    cache = cache or model.new_cache()
    outputs, start = [], 0
    while start < len(ids):
        chunk = ids[start : start + sizes[len(outputs) % len(sizes)]]
        outputs.append(model(chunk, [len(chunk)], [cache]))
        start += len(chunk)
    assert cache.num_tokens == len(ids)
    return torch.cat(outputs)


def assert_close(actual, expected, what):
    worst = (actual - expected).abs().max().item()
    assert worst <= TOLERANCE, f"{what}: logits differ by {worst:.2e}"


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_chunking_gives_the_same_logits(name, chunking):
    """2,049 tokens: 32 x index_topk and more, 16 blocks of 128 and one token over."""
    model = random_model(name)
    for length in (2049, 515) if chunking != "tiny" else (515,):
        ids = tokens(model, length)
        whole = logits(model, [ids])[0]
        assert_close(run(model, ids, CHUNKINGS[chunking]), whole, f"{name}, {length}, {chunking}")


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token(name):
    model = random_model(name)
    ids = tokens(model, 300)
    assert_close(run(model, ids, [1]), logits(model, [ids])[0], name)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 127, 128, 129, 252, 253, 254, 255, 256, 257])
def test_phases_and_borders(length):
    """All phases of the length mod 4, and both sides of a block border (T16)."""
    model = random_model("flash_like")
    ids = tokens(model, length + 200)
    whole = logits(model, [ids])[0]
    cache = model.new_cache()
    assert_close(run(model, ids[:length], [length], cache), whole[:length], "prefill")
    rest = [model(ids[i : i + 1], [1], [cache]) for i in range(length, length + 9)]
    assert_close(torch.cat(rest), whole[length : length + 9], "decode")
    chunk = model(ids[length + 9 :], [191], [cache])
    assert_close(chunk, whole[length + 9 :], "prefill after decode")


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_batch_equals_each_sequence_alone(name):
    """T3: what padding-based batches get silently wrong."""
    model = random_model(name)
    sequences = [tokens(model, n, seed) for seed, n in enumerate((1, 130, 515, 3, 700))]
    for ids, together in zip(sequences, logits(model, sequences), strict=True):
        assert_close(together, logits(model, [ids])[0], f"{name}, {len(ids)} tokens")


def test_mixture_of_prefill_chunk_and_decode_in_one_call():
    model = random_model("flash_like")
    sequences = [tokens(model, n, seed) for seed, n in enumerate((300, 611, 4))]
    whole = logits(model, sequences)
    caches = [model.new_cache() for _ in sequences]
    done = [299, 100, 0]
    for ids, cache, count in zip(sequences, caches, done, strict=True):
        if count:
            model(ids[:count], [count], [cache])
    new = [ids[count:] for ids, count in zip(sequences, done, strict=True)]
    mixed = model(torch.cat(new), [len(n) for n in new], caches).split([len(n) for n in new])
    for rows, expected, count in zip(mixed, whole, done, strict=True):
        assert_close(rows, expected[count:], "mixture")


def test_another_request_before_leaves_no_trace():
    """T9: the published demo never clears its buffers; prompts of 2 and 3 tokens inherit them."""
    for length in (1, 2, 3, 4, 5, 129):
        model, fresh = random_model("flash_like"), random_model("flash_like")
        ids = tokens(model, length + 40)
        run(model, tokens(model, 777, seed=5), [100, 1])
        after = run(model, ids, [length, 1])
        assert torch.equal(after, run(fresh, ids, [length, 1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_the_same(name):
    """Not only close: the property that keeps choices from flipping."""
    model = random_model(name, seed=3)
    ids = tokens(model, 700)
    whole = logits(model, [ids])[0]
    assert torch.equal(run(model, ids, [7, 50, 1, 100, 13, 29]), whole)
    assert torch.equal(logits(model, [ids[:90], ids, ids[5:6]])[1], whole)


def test_ties_of_few_index_heads():
    """T1: with two heads a quarter of all scores is exactly zero; prefill and decode must agree."""
    model = Transformer(schedule(4, 4, index_n_heads=2, index_topk=16))
    randomize(model, 0)
    ids = tokens(model, 600)
    trace = Trace()
    whole = model(ids, [600], trace=trace)
    attention = model.blocks[0].attn
    assert trace.selections["layers.0"][0] is not None
    cache = model.new_cache()
    decoded = [model(ids[:590], [590], [cache])]
    query, weight = attention.indexer.queries(
        torch.randn(50, 24), torch.randn(50, 64), rotation(model.config, attention.kind, ids[:50])
    )
    scores = index_scores(query, weight, cache.layers[0].index_keys.rows(), in_bfloat16=False)
    assert (scores == 0).float().mean() > 0.1  # the ties are there
    decoded += [model(ids[i : i + 1], [1], [cache]) for i in range(590, 600)]
    assert_close(torch.cat(decoded), whole, "ties")
    assert_close(run(model, ids, [7, 50, 1, 100]), whole, "ties, chunked")


@pytest.mark.parametrize("drafted", [1, 2, 5, 130])
def test_rollback_leaves_the_state_as_if_never_drafted(drafted):
    """T8: restoring a snapshot is bit-identical, at every phase."""
    model = random_model("flash_like")
    ids = tokens(model, 400)
    for length in (1, 127, 254, 255, 256):
        cache, clean = model.new_cache(), model.new_cache()
        for state in (cache, clean):
            model(ids[:length], [length], [state])
        snapshot = cache.snapshot()
        model(tokens(model, drafted, seed=9), [drafted], [cache])
        cache.restore(snapshot)
        assert cache.num_bytes() == clean.num_bytes()
        rest = ids[length : length + 140]
        after = model(rest, [140], [cache])
        assert torch.equal(after, model(rest, [140], [clean]))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_rewind_is_a_call_that_ended_earlier(name):
    """Speculation keeps the accepted part of a call without a second pass, at every phase."""
    model = random_model(name)
    ids = tokens(model, 420)
    for length, kept in ((1, 0), (3, 1), (126, 2), (127, 1), (254, 5), (255, 3), (256, 129)):
        cache, clean = model.new_cache(), model.new_cache()
        model(ids[:length], [length], [cache])
        cache.rewindable = True
        model(ids[length : length + 130], [130], [cache])
        cache.rewind(length + kept)
        model(ids[: length + kept], [length + kept], [clean])
        assert cache.num_bytes() == clean.num_bytes()
        rest = ids[length + kept : length + kept + 20]
        assert torch.equal(model(rest, [20], [cache]), model(rest, [20], [clean]))


def test_rewind_refuses_what_it_did_not_keep():
    model = random_model("flash_like")
    cache = model.new_cache()
    model(tokens(model, 20), [20], [cache])
    with pytest.raises(InputError, match="tokens 0 to 20"):
        cache.rewind(10)
    cache.rewindable = True
    model(tokens(model, 20), [20], [cache])
    with pytest.raises(InputError, match="cannot rewind to token 19"):
        cache.rewind(19)
    cache.rewind(30)
    with pytest.raises(InputError, match="once"):
        cache.rewind(25)

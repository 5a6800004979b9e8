"""The same request gives the same tokens, whatever happens around it (issue: line 1)."""

import pytest
import torch

from hadal.engine import LLM, Engine, EngineConfig, FinishReason, SamplingParams
from hadal.model import logits
from tests.engine.fixtures import cached_reference, greedy_reference, model_of, prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def llm(name="flash_like", **settings):
    settings = {"max_model_len": 2048, "cache_bytes": 64 << 20} | settings
    return LLM(model_of(name), **settings)


def tokens_of(completions):
    return [list(c.token_ids) for c in completions]


def test_alone_equals_whole_passes():
    asked = prompts(3, 1, 300)
    expected = [greedy_reference(model_of(), ids, 12) for ids in asked]
    assert [tokens_of(llm().generate([ids], GREEDY))[0] for ids in asked] == expected


@pytest.mark.parametrize(
    "name", ["window_only", "csa_only", "hca_only", "flash_like", "pro_like", "odd"]
)
def test_batched_with_31_others(name):
    model = model_of(name)
    asked = prompts(32, 1, 400, vocab=model.config.vocab_size)
    expected = [cached_reference(model, ids, 12) for ids in asked]
    assert tokens_of(llm(name).generate(asked, GREEDY)) == expected


@pytest.mark.parametrize("budget", [32, 100, 128, 300])
def test_chunked(budget):
    asked = prompts(4, 200, 700, seed=1)
    expected = [cached_reference(model_of(), ids, 12) for ids in asked]
    chunked = llm(max_num_batched_tokens=budget, max_num_seqs=4)
    assert tokens_of(chunked.generate(asked, GREEDY)) == expected


@pytest.mark.parametrize("drafts", [0, 2])
def test_log_probabilities_of_the_whole_vocabulary(drafts):
    """To 1e-5 those of whole passes without a cache: in chunks, beside others, and from the cache."""
    model = model_of("small_stack")
    engine = llm("small_stack", max_num_batched_tokens=100, num_speculative_tokens=drafts)
    asked = prompts(3, 300, 500, vocab=model.config.vocab_size)
    every = SamplingParams(
        temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=model.config.vocab_size
    )
    cold = engine.generate(asked, every)
    warm = engine.generate(asked, every)
    assert all(c.prefix.hit for c in warm)
    for done in (*cold, *warm):
        ids = [*done.prompt_ids, *done.token_ids]
        [whole_TV] = logits(model, [ids])
        expected_TV = whole_TV[len(done.prompt_ids) - 1 : -1].log_softmax(-1)
        for expected_V, found in zip(expected_TV, done.logprobs, strict=True):
            top = dict(found.top)
            got_V = torch.tensor([top[i] for i in range(len(expected_V))])
            torch.testing.assert_close(got_V, expected_V, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["all", "periodic", "none"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_resent_and_continued(policy, drafts):
    """Windows are read, or brought back by running their tokens again: nothing differs."""
    engine = llm("small_stack", window_policy=policy, num_speculative_tokens=drafts)
    [ids] = prompts(1, 900, 900)
    expected = cached_reference(model_of("small_stack"), ids, 12)
    [cold] = engine.generate([ids], GREEDY)
    [warm] = engine.generate([ids], GREEDY)
    assert tokens_of([cold, warm]) == [expected, expected]
    assert (cold.prefix.hit, cold.prefix.replayed, cold.prefix.computed) == (0, 0, 900)
    assert warm.prefix.computed == 900 - 896
    if policy == "none":
        assert 0 < warm.prefix.replayed <= engine.engine.cache.recompute_tokens
    else:
        assert (warm.prefix.hit, warm.prefix.replayed) == (896, 0)
    longer = [*ids, *cold.token_ids, *prompts(1, 150, 150, seed=5)[0]]
    [turn] = engine.generate([longer], GREEDY)
    assert list(turn.token_ids) == cached_reference(model_of("small_stack"), longer, 12)
    assert turn.prefix.hit + turn.prefix.replayed == 896


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("name", ["flash_like", "odd", "pro_like"])
def test_speculation_changes_nothing(name, drafts):
    asked = prompts(6, 1, 300, seed=2, vocab=300)
    params = [GREEDY, SamplingParams(max_tokens=30, seed=3, ignore_eos=True)] * 3
    plain = llm(name).generate(asked, params)
    drafted = llm(name, num_speculative_tokens=drafts).generate(asked, params)
    assert tokens_of(drafted) == tokens_of(plain)
    assert all(c.drafted > 0 for c in drafted)


@pytest.mark.parametrize("drafts", [0, 2])
def test_preempted(drafts):
    """Two long answers that do not fit together: one gives way and comes back."""
    engine = llm(
        cache_bytes=9 * llm().engine.memory.block_bytes,
        max_model_len=9 * 128,
        num_speculative_tokens=drafts,
    )
    asked = prompts(3, 250, 300, seed=4)
    params = SamplingParams(temperature=0.0, max_tokens=260, ignore_eos=True)
    done = engine.generate(asked, params)
    assert sum(c.num_preemptions for c in done) > 0
    assert tokens_of(done) == [cached_reference(model_of(), ids, 260) for ids in asked]
    use = engine.engine.cache.pool.use()
    assert use.held == 0


def test_cancelled_and_resent():
    engine = Engine(model_of(), EngineConfig(max_model_len=2048, max_num_batched_tokens=256))
    [ids] = prompts(1, 700, 700, seed=6)
    engine.add(ids, GREEDY, request_id="a")
    engine.step()
    cancelled = engine.cancel("a")
    assert cancelled is not None
    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert engine.cancel("a") is None
    assert engine.cache.pool.use().held == 0
    assert not engine.has_work
    engine.add(ids, GREEDY, request_id="a")
    completion = None
    while engine.has_work:
        for update in engine.step():
            completion = update.completion or completion
    assert completion is not None
    assert completion.prefix.hit == 256
    assert list(completion.token_ids) == cached_reference(model_of(), ids, 12)


@pytest.mark.parametrize("length", [1, 2, 128, 129, 257])
def test_prompts_of_which_one_token_is_left(length):
    """A hit can leave a single token, which looks like decoding and is not."""
    engine = llm()
    [ids] = prompts(1, length, length, seed=8)
    expected = cached_reference(model_of(), ids, 12)
    for _ in range(2):
        assert tokens_of(engine.generate([ids], GREEDY)) == [expected]

"""One token from logits: the parameters as they are defined, and noise that depends on nothing else."""

import math
from itertools import pairwise

import pytest
import torch

from hadal.engine import LLM, FinishReason, SamplingParams
from hadal.engine.sampler import History, sample, token_logprobs
from hadal.errors import InputError
from tests.engine.fixtures import cached_reference, model_of, prompts

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def drawn(count=4000, logits=LOGITS, **params):
    chosen = [sample(logits, SamplingParams(**params), seed=1, position=i) for i in range(count)]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / count


def test_frequencies_are_the_softmax():
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(0)
        assert torch.allclose(drawn(temperature=temperature), expected, atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": -1}, 6),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.8}, 3),
        ({"min_p": 0.3}, 2),
        ({"top_k": 3, "top_p": 0.7}, 2),
    ],
)
def test_truncations_keep_the_best_and_their_proportions(params, kept):
    expected = torch.zeros(6)
    expected[:kept] = LOGITS[:kept].softmax(0)
    found = drawn(**params)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, atol=0.03)


def test_penalties_are_their_formulas():
    history = History(frozenset({1, 4}))
    for token in (0, 0, 3):
        history.add(token)
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.25, frequency_penalty=0.5, repetition_penalty=2.0
    )
    by_hand = LOGITS.clone()
    for token in (0, 1, 3, 4):
        by_hand[token] = by_hand[token] / 2 if by_hand[token] > 0 else by_hand[token] * 2
    by_hand[0] -= 2 * 0.5 + 0.25
    by_hand[3] -= 0.5 + 0.25
    for token in range(6):  # raise each to the top in turn: the margin must be the formula's
        margin = float(by_hand.max() - by_hand[token])
        for extra, wins in ((margin + 1e-3, True), (margin - 1e-3, False)):
            if token == int(by_hand.argmax()):
                continue
            biased = SamplingParams(
                temperature=0.0,
                presence_penalty=0.25,
                frequency_penalty=0.5,
                repetition_penalty=2.0,
                logit_bias={token: extra},
            )
            got = sample(LOGITS, biased, seed=0, position=0, history=history)
            assert (got == token) is wins
    assert sample(LOGITS, params, seed=0, position=0, history=history) == int(by_hand.argmax())


def test_noise_depends_on_seed_and_position_alone():
    flat = torch.zeros(50)
    one = [sample(flat, SamplingParams(), seed=3, position=i) for i in range(50)]
    assert one == [sample(flat, SamplingParams(), seed=3, position=i) for i in range(50)]
    assert one != [sample(flat, SamplingParams(), seed=4, position=i) for i in range(50)]
    assert len(set(one)) > 20


def test_logprobs():
    scored = token_logprobs(LOGITS, 2, 3)
    logprobs = LOGITS.log_softmax(0)
    assert math.isclose(scored.logprob, logprobs[2].item(), rel_tol=1e-6)
    assert scored.rank == 3
    assert [token for token, _ in scored.top] == [0, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": "1"},
        {"top_k": 1.5},
        {"max_tokens": -1},
        {"stop": ("",)},
        {"stop_token_ids": (-1,)},
        {"seed": 1.0},
        {"logit_bias": {1: 200}},
        {"ignore_eos": 1},
    ],
)
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("ids", "params", "match"),
    [
        ([], SamplingParams(), "no token"),
        ([5, 512], SamplingParams(), "512"),
        ([5, -1], SamplingParams(), "-1"),
        ([5, True], SamplingParams(), "True"),
        ([5], SamplingParams(stop_token_ids=(999,)), "999"),
        ([5], SamplingParams(stop=("x",)), "token_bytes"),
        ([5] * 3000, SamplingParams(), "context too long"),
    ],
)
def test_wrong_requests_run_nothing(ids, params, match):
    llm = LLM(model_of(), max_model_len=2048)
    with pytest.raises(InputError if "long" not in match else ValueError, match=match):
        llm.generate([[5, 6], ids], [SamplingParams(max_tokens=1), params])
    assert not llm.engine.has_work
    assert llm.engine.cache.pool.use().held == 0


def test_ends():
    """Stop tokens, stop texts across tokens, least and most tokens, the end of the context."""
    [ids] = prompts(1, 50, 50, seed=3)
    model = model_of()
    expected = cached_reference(model, ids, 40)
    llm = LLM(model, max_model_len=80, token_bytes=lambda i: f"<{i}>".encode())

    def run(**params):
        return llm.generate([ids], SamplingParams(temperature=0.0, **params))[0]

    third = expected[2]
    first_at = expected.index(third)
    stopped = run(stop_token_ids=(third,))
    assert list(stopped.token_ids) == expected[: first_at + 1]
    assert (stopped.finish_reason, stopped.stop) == (FinishReason.STOP, third)
    text = f"{expected[4]}><{expected[5]}"
    stopped = run(stop=(text, "never"))
    pairs = list(pairwise(expected))
    assert list(stopped.token_ids) == expected[: pairs.index((expected[4], expected[5])) + 2]
    assert stopped.stop == text
    assert len(run(max_tokens=0).token_ids) == 0
    late = run(stop_token_ids=(third,), min_tokens=first_at + 2)
    assert len(late.token_ids) >= first_at + 2
    assert third not in late.token_ids[: first_at + 2]
    whole = run(ignore_eos=True)
    assert (len(whole.token_ids), whole.finish_reason) == (30, FinishReason.LENGTH)


def test_prompt_logprobs_and_routes_are_those_of_a_whole_pass():
    from hadal.model import Trace

    [ids] = prompts(1, 300, 300, seed=3)
    model = model_of()
    llm = LLM(model, max_model_len=512, max_num_batched_tokens=128)
    params = SamplingParams(
        max_tokens=2, temperature=0.0, prompt_logprobs=2, logprobs=0, return_routed_experts=True
    )
    for _ in range(2):  # also when the blocks are known
        [done] = llm.generate([ids], params)
        trace = Trace()
        with torch.no_grad():
            whole = torch.tensor([*ids, *done.token_ids[:-1]])
            logprobs = model(whole, [len(whole)], trace=trace).log_softmax(-1)
        assert [s.token_id for s in done.prompt_logprobs] == ids[1:]
        for place, scored in enumerate(done.prompt_logprobs):
            assert math.isclose(
                scored.logprob, logprobs[place, ids[place + 1]].item(), abs_tol=1e-5
            )
        routes = torch.tensor(done.routed_experts)
        assert routes.shape == (301, 5, 3)
        for layer in range(5):
            assert torch.equal(routes[:, layer], trace.routes[f"layers.{layer}"])

"""Who runs when: fairness, budgets, blocks that add up, memory that was planned."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.engine import LLM, Engine, EngineConfig, FinishReason, SamplingParams
from hadal.engine.block_pool import BLOCK_TOKENS, BlockPool, chain_keys
from hadal.errors import CapacityError, ConfigError
from tests.engine.fixtures import model_of, prompts


def test_a_long_prompt_does_not_starve_short_ones():
    engine = Engine(model_of(), EngineConfig(max_model_len=8000, max_num_batched_tokens=512))
    [long] = prompts(1, 7000, 7000)
    engine.add(long, SamplingParams(max_tokens=1), request_id="long")
    engine.step()
    for i, ids in enumerate(prompts(6, 50, 200)):
        engine.add(ids, SamplingParams(max_tokens=5, ignore_eos=True), request_id=f"short-{i}")
    finished = {}
    while engine.has_work:
        for update in engine.step():
            if update.completion is not None:
                finished[update.request_id] = engine.num_steps
    assert max(v for k, v in finished.items() if k != "long") < 15
    assert finished["long"] > 13


def test_every_step_stays_within_its_budget_and_chunks_end_at_blocks():
    engine = Engine(model_of(), EngineConfig(max_model_len=2048, max_num_batched_tokens=300))
    for ids in prompts(8, 1, 1500, seed=2):
        engine.add(ids, SamplingParams(max_tokens=20, ignore_eos=True))
    while engine.has_work:
        ran = engine.step()
        assert sum(u.num_run for u in ran) <= 300
        for update in ran:
            done, total = update.prefill
            alone = len([u for u in ran if u.prefill[0] < u.prefill[1]]) == 1
            if done < total and alone and update.num_run >= BLOCK_TOKENS:
                assert done % BLOCK_TOKENS == 0


def test_the_same_run_again_takes_the_same_steps():
    def run():
        engine = Engine(model_of(), EngineConfig(max_model_len=2048, max_num_batched_tokens=300))
        steps = []
        for ids in prompts(5, 1, 600, seed=2):
            engine.add(ids, SamplingParams(max_tokens=20))
        while engine.has_work:
            steps.append([(u.request_id, u.num_run, u.token_ids) for u in engine.step()])
        return steps

    assert run() == run()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_token_is_chosen_from_logits_that_are_no_numbers(value):
    model = copy.deepcopy(model_of())
    with torch.no_grad():
        model.head.weight[77] = value
    engine = Engine(model, EngineConfig(max_model_len=1000))
    engine.add(prompts(1, 50, 50)[0], SamplingParams(max_tokens=5))
    [update] = engine.step()
    assert not update.token_ids
    assert update.completion is not None
    assert update.completion.finish_reason is FinishReason.ERROR
    assert "logits are not finite" in str(update.completion.error)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_add_up(data):
    """Sequences that come, share, grow and go: every block is held, cached or empty."""
    pool = BlockPool(12)
    live: list[tuple[list[int], list[bytes]]] = []
    texts = [[i] * 40 * BLOCK_TOKENS for i in range(3)]
    keys = [chain_keys(b"root", text) for text in texts]
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["open", "grow", "close", "clear"]))
        if action == "open":
            own = data.draw(st.sampled_from(keys))
            chain = pool.chain(own)
            for block in chain:
                pool.hold(block)
            live.append((chain, own))
        elif action == "grow" and live and pool.use().available:
            blocks, own = data.draw(st.sampled_from(live))
            block = pool.take()
            blocks.append(pool.seal(block, own[len(blocks)]))
        elif action == "close" and live:
            blocks, _ = live.pop(data.draw(st.integers(0, len(live) - 1)))
            pool.release(blocks)
        elif action == "clear":
            pool.clear()
        use = pool.use()
        held = {block for blocks, _ in live for block in blocks}
        assert use.held == len(held)
        assert use.held + use.cached + use.empty == use.total == 12
        for blocks, own in live:
            assert [pool.key_of(b) for b in blocks] == own[: len(blocks)]
    for blocks, _ in live:
        pool.release(blocks)
    assert pool.use().held == 0


def test_chain_keys_name_everything_before():
    ids = list(range(300))
    keys = chain_keys(b"root", ids)
    assert len(keys) == 2
    assert chain_keys(keys[0], ids, after=128) == keys[1:]
    assert chain_keys(b"other", ids)[0] != keys[0]
    assert chain_keys(b"root", [7, *ids[1:]])[1] != keys[1]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"checkpoint_interval": 100}, "multiple of 128"),
        ({"cache_format": "fp4"}, "cache_format"),
        ({"cache_format": "fp8-fp4"}, "would round"),
        ({"cache_format": "bf16"}, "would round"),
        ({"window_policy": "some"}, "window_policy"),
        ({"max_num_batched_tokens": 16}, "decoding requests"),
        ({"cache_bytes": 10}, "holds no block"),
        ({"max_model_len": 4096, "cache_bytes": 100_000}, "does not fit"),
    ],
)
def test_settings_that_do_not_fit(wrong, match):
    with pytest.raises(ConfigError, match=match):
        LLM(model_of(), **wrong)


def test_memory_is_planned_by_purpose():
    engine = LLM(model_of(), max_model_len=2048, cache_bytes=10 << 20).engine
    plan = engine.memory
    assert plan.blocks == plan.num_blocks * plan.block_bytes <= 10 << 20
    [ids] = prompts(1, 511, 511)
    engine.add(ids, SamplingParams(max_tokens=1))
    engine.scheduler.plan()
    [request] = engine.scheduler.running
    assert request.sequence is not None
    engine.cancel(request.request_id)
    assert plan.total > plan.blocks + plan.weights
    sizes = []
    cache = engine.model.new_cache()
    for chunk in torch.tensor(ids).split(7):
        engine.model(chunk, [len(chunk)], [cache])
        sizes.append(cache.slot_bytes())
    draft = 15 * 32 * 4  # the MTP block's window is in the plan as well
    assert max(sizes) + draft <= plan.slots // 32


def test_capacity_error_is_retryable():
    assert CapacityError("full").retryable

"""An engine divided among processes gives what one process gives, bit for bit."""

import dataclasses
import os
import signal
import subprocess

import pytest
import torch

from hadal.checkpoint import save
from hadal.engine import LLM, FinishReason, SamplingParams
from hadal.errors import ConfigError, EngineError
from hadal.model import Shard, Transformer, randomize
from tests.configs import CONFIGS, schedule
from tests.engine.fixtures import model_of, prompts

SETTINGS = {"max_model_len": 2048, "cache_bytes": 8 << 20, "max_num_seqs": 4}
MIXED = [
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=5),
    SamplingParams(max_tokens=20, seed=3, ignore_eos=True, logprobs=2, frequency_penalty=0.5),
    SamplingParams(max_tokens=9, seed=4, prompt_logprobs=1, return_routed_experts=True),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "model"
    save(model_of("flash_like"), path)
    return path


@pytest.fixture
def divided(checkpoint):
    """Make divided engines, and close them."""
    made = []

    def make(path=checkpoint, **settings):
        made.append(LLM(path, tensor_parallel_size=2, **SETTINGS | settings))
        return made[-1]

    threads = torch.get_num_threads()
    yield make
    for llm in made:
        llm.engine.close()
    torch.set_num_threads(threads)


def differences(found, expected):
    """Name what differs; the values are long."""
    names = "token_ids finish_reason logprobs prompt_logprobs routed_experts prefix".split()
    return [
        f"completion {place}: {name}"
        for place, (a, b) in enumerate(zip(found, expected, strict=True))
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]


@pytest.mark.parametrize("drafts", [0, 2])
def test_same_bits(checkpoint, divided, drafts):
    """Tokens, log-probabilities and routes; cold, in chunks, and again from the cache."""
    settings = {"num_speculative_tokens": drafts, "max_num_batched_tokens": 100}
    asked = prompts(6, 1, 500, seed=1)
    params = MIXED * 2
    alone = LLM(checkpoint, **SETTINGS | settings)
    together = divided(**settings)
    for _ in range(2):
        assert not differences(together.generate(asked, params), alone.generate(asked, params))
    assert together.engine.cache.pool.use() == alone.engine.cache.pool.use()


def test_each_holds_a_part(divided):
    whole = sum(t.numel() for t in model_of("flash_like").state_dict().values())
    part = sum(t.numel() for t in divided().engine.model.state_dict().values())
    assert part < 0.65 * whole  # norms, mHC, gates and compressors are in both


@pytest.mark.slow
def test_from_disk_and_preempted(checkpoint, divided, tmp_path):
    """What one process read from disk all have; both give way together when memory runs out."""
    asked = prompts(3, 250, 300, seed=4)
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    block = LLM(checkpoint, **SETTINGS).engine.memory.block_bytes
    tight = {"cache_bytes": 9 * block, "max_model_len": 9 * 128}
    expected = LLM(checkpoint, **SETTINGS | tight).generate(asked, params)
    first = divided(disk_path=tmp_path, **tight)
    done = first.generate(asked, params)
    assert [c.token_ids for c in done] == [c.token_ids for c in expected]
    assert sum(c.num_preemptions for c in done) > 0
    first.engine.close()
    [again] = divided(disk_path=tmp_path).generate(asked[:1], params)
    assert again.token_ids == expected[0].token_ids
    assert again.prefix.from_disk == len(asked[0]) // 128 * 128


def test_stop_texts_and_grammars_are_the_first_process_s(checkpoint):
    class Only:
        """A constraint that allows one token."""

        def mask(self, logits_V):
            return torch.full_like(logits_V, float("-inf")).index_fill(0, torch.tensor([7]), 0.0)

        def accept(self, token_id):
            assert token_id == 7

    threads = torch.get_num_threads()
    llm = LLM(
        checkpoint,
        tensor_parallel_size=2,
        token_bytes=lambda i: b"x" if i == 7 else b"?",
        **SETTINGS,
    )
    params = SamplingParams(max_tokens=9, constraint=Only, stop=("xxx",))
    [done] = llm.generate([[0, 5, 9]], params)
    llm.engine.close()
    torch.set_num_threads(threads)
    assert (done.token_ids, done.finish_reason) == ((7, 7, 7), FinishReason.STOP)


def test_cancelled(checkpoint, divided):
    [ids] = prompts(1, 700, 700, seed=6)
    [done] = LLM(checkpoint, **SETTINGS).generate([ids], MIXED[0])
    engine = divided().engine
    engine.add(ids, MIXED[0], request_id="a")
    engine.step()
    assert engine.cancel("a") is not None
    engine.add(ids, MIXED[0], request_id="a")
    completion = None
    while engine.has_work:
        for update in engine.step():
            completion = update.completion or completion
    assert completion is not None
    assert completion.token_ids == done.token_ids


def test_stored_formats(divided, tmp_path):
    """FP8 is cut where its blocks end, FP4 experts stay whole."""
    config = schedule(
        0, 4, 128, hidden_size=256, head_dim=64, o_lora_rank=128, moe_intermediate_size=256
    )
    model = Transformer(config)
    randomize(model, 0)
    save(model, tmp_path / "model", config=config.quantized("instruct"))
    asked = prompts(2, 100, 300)
    alone = LLM(tmp_path / "model", **SETTINGS).generate(asked, MIXED[0])
    assert not differences(divided(tmp_path / "model").generate(asked, MIXED[0]), alone)


def test_what_cannot_be_divided(divided, tmp_path):
    save(model_of("odd"), tmp_path / "odd")
    with pytest.raises(ConfigError, match="cannot be divided among 2"):
        divided(tmp_path / "odd")
    config = dataclasses.replace(CONFIGS["flash_like"], max_position_embeddings=256)
    with pytest.raises(ConfigError, match="give LLM the path"):
        LLM(Transformer(config), tensor_parallel_size=2)


def test_a_lost_process_is_an_error_not_a_wait(divided):
    """Kill -9 of the other process: the next steps say so, and nothing hangs."""
    llm = divided()
    children = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "hadal.engine.worker"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    with pytest.raises(EngineError):
        llm.generate([[0, 5, 9]], MIXED[0])
    with pytest.raises(EngineError, match="are gone"):
        llm.generate([[0, 5, 9]], MIXED[0])


def test_a_step_that_fails_in_the_first_process_ends_them_all(divided):
    """The others wait in the middle of that step: nothing may wait for them in turn."""

    class Broken:
        """A constraint that fails."""

        def mask(self, logits_V):
            raise RuntimeError("no mask today")

        def accept(self, token_id):
            raise AssertionError

    llm = divided()
    with pytest.raises(EngineError, match="no mask today"):
        llm.generate([[0, 5, 9]], SamplingParams(constraint=Broken))
    assert llm.engine._team.started[0].poll() is not None
    with pytest.raises(EngineError, match="are gone"):
        llm.generate([[0, 5, 9]], MIXED[0])


class Waiting:
    """What `torch.distributed` returns of an operation in which the other process takes no part."""

    def __init__(self, ends_after):
        self.waits, self._ends_after = 0, ends_after

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits <= self._ends_after:
            raise RuntimeError("Operation timed out!")

    def is_completed(self):
        return False


def test_a_process_that_gloo_does_not_miss_is_missed(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    slow = Waiting(ends_after=3)
    Shard(0, 2, lambda: True).finish(slow)
    assert slow.waits == 4
    with pytest.raises(RuntimeError, match="timed out"):
        Shard(0, 2, lambda: False).finish(Waiting(ends_after=3))

"""Small steps run on one thread."""

import pytest
import torch

from hadal.checkpoint import load
from hadal.config import ModelConfig
from hadal.engine import LLM, SamplingParams
from hadal.engine.threads import few_threads
from hadal.nano import nano_checkpoint


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("work", "threads"),
    [
        ([(1, 100)], 1),
        ([(1, 4096)] * 4, 1),
        ([(512, 512)], 2),
        ([(1, 1 << 20)], 2),
        ([(1, 100)] * 64, 2),
    ],
)
def test_threads_of_a_step(two_threads, work, threads):
    config = ModelConfig.from_upstream(nano_checkpoint())
    with few_threads(config, work):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error(two_threads):
    with pytest.raises(RuntimeError), few_threads(ModelConfig.nano(), [(1, 1)]):
        raise RuntimeError
    assert torch.get_num_threads() == 2


def test_the_answer_is_the_same(two_threads):
    """With both threads for the prompt and one for what follows, as with one for all."""
    llm = LLM(load(nano_checkpoint()), max_model_len=1024, prefix_caching=False)
    prompt = [(7 * i) % 2000 + 10 for i in range(700)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        [completion] = llm.generate([prompt], params)
        answers.append(completion.token_ids)
    assert answers[0] == answers[1]

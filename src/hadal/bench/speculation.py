"""W6: multi-token prediction on a network that has learned something: same tokens, how much faster."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from hadal.bench.report import Report, interleave
from hadal.config import ModelConfig
from hadal.engine import LLM, SamplingParams
from hadal.model import Transformer, training_forward

__all__ = ["measure", "trained"]

_VOCAB: Final = 64
_WORDS: Final = 40
"""Words of the language: each a fixed run of tokens, so that most tokens can be foreseen."""


def _words() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, _VOCAB) for _ in range(rng.randint(3, 7))] for _ in range(_WORDS)]


def _text(rng: random.Random, count: int) -> list[int]:
    words, text = _words(), []
    while len(text) < count:
        text += rng.choice(words)
    return text[:count]


@contextmanager
def _one_thread() -> Generator[None]:
    """Add in the same order every time: with two threads every run trains another network (dev/LOG.md)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def trained(steps: int) -> tuple[Transformer, float]:
    """Train a small network, its MTP block included, on a made-up language; return the last loss."""
    config = replace(ModelConfig.nano(), vocab_size=_VOCAB)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    rng = random.Random(1)
    loss = torch.zeros(())
    for _ in range(steps):
        texts = [_text(rng, 128) for _ in range(8)]
        ids = torch.tensor([token for text in texts for token in text])
        found = training_forward(model, ids, [128] * 8)
        loss = found.language
        optimizer.zero_grad()
        (found.language + 0.3 * found.mtp + 1e-3 * found.balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), float(loss.detach())


@dataclass
class _Run:
    """Generates with so many drafts; keeps the last answers and the share of drafts accepted."""

    model: Transformer
    prompts: list[list[int]]
    params: SamplingParams
    drafts: int
    answers: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    accepted: float = 0.0

    def __call__(self) -> None:
        llm = LLM(
            self.model,
            max_model_len=2048,
            num_speculative_tokens=self.drafts,
            prefix_caching=False,
        )
        done = [llm.generate([prompt], self.params)[0] for prompt in self.prompts]
        self.answers = [c.token_ids for c in done]
        self.accepted = sum(c.accepted for c in done) / max(sum(c.drafted for c in done), 1)


def measure(steps: int, new: int, rounds: int) -> Report:
    """Generate with and without drafts, greedily and by sampling."""
    model, loss = trained(steps)
    report = Report(f"W6 speculation: nano, {steps} steps of training, {new} tokens a request")
    report.figures["loss after training, nats a token"] = loss
    rng = random.Random(2)
    prompts = [_text(rng, 40) for _ in range(4)]
    modes = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True),
        "sampled": SamplingParams(max_tokens=new, seed=0, ignore_eos=True),
    }
    for mode, params in modes.items():
        runs = {str(drafts): _Run(model, prompts, params, drafts) for drafts in (0, 1, 2)}
        spreads = interleave(runs, rounds, warm_up=False)
        for name, run in runs.items():
            report.figures[f"{mode}, {name} drafts: seconds"] = spreads[name]
            if run.drafts:
                gain = spreads["0"].median / spreads[name].median
                report.figures[f"{mode}, {name} drafts: accepted"] = run.accepted
                report.figures[f"{mode}, {name} drafts: speed-up"] = gain
                same = run.answers == runs["0"].answers
                report.figures[f"{mode}, {name} drafts: same tokens"] = "yes" if same else "NO"
    report.notes.append("the language is made up: acceptance says nothing about real text")
    return report

"""W6: multi-token prediction on a network that has learned something: same tokens, how much faster."""

import random
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


def trained(steps: int) -> tuple[Transformer, float]:
    """Train a small network, its MTP block included, on a made-up language; return the last loss."""
    config = ModelConfig.nano(vocab_size=_VOCAB)
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
    return model.eval(), float(loss)


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
        answers: dict[int, list[tuple[int, ...]]] = {}
        rates: dict[int, float] = {}

        def run(drafts: int, params: SamplingParams = params) -> None:
            llm = LLM(
                model, max_model_len=2048, num_speculative_tokens=drafts, prefix_caching=False
            )
            done = [llm.generate([prompt], params)[0] for prompt in prompts]
            answers[drafts] = [c.token_ids for c in done]
            rates[drafts] = sum(c.accepted for c in done) / max(sum(c.drafted for c in done), 1)

        runners = {str(k): (lambda k=k: run(k)) for k in (0, 1, 2)}
        spreads = interleave(runners, rounds, warm_up=False)
        for drafts in (0, 1, 2):
            report.figures[f"{mode}, {drafts} drafts: seconds"] = spreads[str(drafts)]
            if drafts:
                gain = spreads["0"].median / spreads[str(drafts)].median
                report.figures[f"{mode}, {drafts} drafts: accepted"] = rates[drafts]
                report.figures[f"{mode}, {drafts} drafts: speed-up"] = gain
                same = answers[drafts] == answers[0]
                report.figures[f"{mode}, {drafts} drafts: same tokens"] = "yes" if same else "NO"
    report.notes.append("the language is made up: acceptance says nothing about real text")
    return report

"""Models, prompts and references of the engine's tests."""

import functools
import random

import torch

from hadal.model import Transformer, logits, randomize
from tests.configs import CONFIGS, schedule

SMALL_STACK = schedule(0, 4, 128, 4, num_hash_layers=1, sliding_window=16)
"""Every kind of layer and a short window, so that 128 x layers is soon passed."""


@functools.cache
def model_of(name: str = "flash_like", seed: int = 0) -> Transformer:
    config = SMALL_STACK if name == "small_stack" else CONFIGS[name]
    model = Transformer(config)
    randomize(model, seed)
    return model


def prompts(count: int, low: int, high: int, *, seed: int = 0, vocab: int = 512) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab) for _ in range(rng.randint(low, high))] for _ in range(count)]


def greedy_reference(model: Transformer, ids: list[int], count: int) -> list[int]:
    """Greedy tokens by whole passes without any cache: the slow truth."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, [ids])[0][-1].argmax()))
    return ids[-count:] if count else []


def cached_reference(model: Transformer, ids: list[int], count: int) -> list[int]:
    """Greedy tokens with the model's own cache, alone and in one chunk."""
    cache, out = model.new_cache(), []
    with torch.no_grad():
        row = model(torch.tensor(ids), [len(ids)], [cache])[-1]
        for _ in range(count):
            out.append(int(row.argmax()))
            row = model(torch.tensor(out[-1:]), [1], [cache])[-1]
    return out

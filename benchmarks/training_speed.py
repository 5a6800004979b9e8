"""Tokens a second of nano's training: forward, all losses and gradients, with the modules and with their fast twins.

    python benchmarks/training_speed.py [--tokens 4096] [--length 1024] [--rounds 5] [--threads 1]

Both do the same work in turn on the same samples: all stages of the recipe's batch but the optimiser, which is the same. Gradients
of both are compared before, with all entries attended to, since choices at ties differ: how far apart they are is printed beside.
"""

import argparse
import dataclasses
import json
import statistics
import time
from typing import Literal

import torch

from hadal.config import ModelConfig
from hadal.model import Transformer
from hadal.model.training import training_forward

VOCABULARY = 2048
"""As recipes/nano.py."""


def step(
    model: Transformer,
    ids: torch.Tensor,
    lengths: list[int],
    *,
    fast: bool,
    stage: Literal["dense", "sparse"] = "sparse",
) -> float:
    """Return the seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    out = training_forward(model, ids, lengths, indexer_stage=stage, fast=fast)
    loss = out.language + 0.3 * out.mtp + out.indexer + 1e-4 * out.balance
    loss.backward()
    return time.perf_counter() - start


def gradient(model: Transformer) -> torch.Tensor:
    """Return all gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of a step; the recipe's worker")
    parser.add_argument("--length", type=int, default=1024, help="of a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="the recipe has one a worker")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = Transformer(dataclasses.replace(ModelConfig.nano(), vocab_size=VOCABULARY))
    ids = torch.randint(
        2, VOCABULARY, (options.tokens,), generator=torch.Generator().manual_seed(0)
    )
    lengths = [options.length] * (options.tokens // options.length)
    ids = ids[: sum(lengths)]
    sides = {"modules": False, "fast twins": True}
    first: dict[str, torch.Tensor] = {}
    for name, fast in sides.items():
        step(model, ids, lengths, fast=fast, stage="dense")  # entries are not chosen, at ties
        first[name] = gradient(model).clone()
    apart = (first["modules"] - first["fast twins"]).norm() / first["modules"].norm()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, fast in sides.items():
            seconds[name].append(step(model, ids, lengths, fast=fast))
    rates = {
        name: [ids.shape[0] / statistics.median(s), ids.shape[0] / max(s), ids.shape[0] / min(s)]
        for name, s in seconds.items()
    }
    if options.json:
        print(json.dumps({"tokens_per_second": rates, "gradients_apart": float(apart)}))
        return
    for name, (median, least, most) in rates.items():
        print(f"{name:12} {median:8,.0f} tokens/s ({least:,.0f}..{most:,.0f}, {options.rounds})")
    print(f"ratio {rates['fast twins'][0] / rates['modules'][0]:.2f}; gradients {apart:.1e} apart")


if __name__ == "__main__":
    main()

"""W7: what a token and a request really occupy, beside the formulas of `hadal cost`."""

import random

import torch

from hadal.bench.networks import NetworkName, network
from hadal.bench.report import Report
from hadal.cost import KV_FORMATS
from hadal.cost.kv import kv_by_kind
from hadal.engine import Engine, EngineConfig, SamplingParams
from hadal.model import Precision

__all__ = ["measure"]

_MODELS = {
    "fp32": (torch.float32, Precision.exact()),
    "bf16": (torch.bfloat16, Precision.exact()),
    "fp8-fp4": (torch.float32, Precision.published()),
}


def measure(name: NetworkName, tokens: int) -> Report:
    """Grow one request to so many tokens in every format and weigh it.

    The bytes are those of the tensors that hold it: blocks in use, and windows and tails.
    """
    report = Report(f"W7 cache bytes: {name}, one request of {tokens} tokens")
    rng = random.Random(0)
    for kv_format, (dtype, precision) in _MODELS.items():
        model = network(name, dtype=dtype, precision=precision)
        engine = Engine(
            model,
            EngineConfig(
                max_model_len=tokens + 128,
                cache_format=kv_format,
                max_num_seqs=1,
                window_policy="none",
            ),
        )
        ids = [rng.randrange(2, model.config.vocab_size) for _ in range(tokens)]
        engine.add(ids, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        while engine.has_work and not engine.scheduler.running[:1]:
            engine.step()
        running = engine.scheduler.running
        while running[0].num_computed < tokens:
            engine.step()
        sequence = running[0].sequence
        assert sequence is not None
        per_token = engine.cache.pool.use().held * engine.memory.block_bytes / sequence.num_tokens
        layers = kv_by_kind(model.config, tokens, KV_FORMATS[kv_format])
        planned = sum(layer.bytes_per_token for layer in layers)
        fixed = sequence.main.slot_bytes()
        formula = sum(layer.window_bytes + layer.tail_bytes for layer in layers)
        report.figures |= {
            f"{kv_format}: bytes a token": per_token,
            f"{kv_format}: formula": planned,
            f"{kv_format}: ratio": per_token / planned,
            f"{kv_format}: bytes a request, windows and tails": float(fixed),
            f"{kv_format}: formula, tails full": float(formula),
        }
        engine.close()
    report.notes.append("goal: bytes a token within 5 % of the formula")
    report.notes.append("windows are kept in the model's dtype, not in the entries' format")
    return report

"""One sequence up to a million tokens: memory over the weights and time per token as it grows.

Real prefill in chunks, then decoding, at every power of two. The state is kept on disk, so that a run
that was stopped goes on where it was; figures are appended to a file as they are measured.

    python benchmarks/long_context.py [--tokens 1048576] [--folder /tmp/hadal-long] [--threads 2]
    python benchmarks/long_context.py --plot docs/figures/long-context.svg
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from hadal.engine import Engine, EngineConfig, SamplingParams
from hadal.model import ModelConfig, Transformer, randomize

DECODED = 16
"""Tokens decoded at each length."""
CHUNKS = 16
"""Of the prefill before each length, those that are reported."""


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    fields = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(f for f in fields if f.startswith("VmRSS")).split()[1]) * 1024


def peak_bytes() -> int:
    """Return the most that ever was."""
    fields = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(f for f in fields if f.startswith("VmHWM")).split()[1]) * 1024


def measure(engine: Engine, ids: list[int], before: int) -> dict[str, object]:
    """Grow the sequence to these tokens, decode a few, and report."""
    engine.add(ids, SamplingParams(temperature=0.0, max_tokens=DECODED + 1, ignore_eos=True))
    prefill: list[float] = []
    decode: list[float] = []
    done = None
    while engine.has_work:
        start = time.perf_counter()
        [update] = engine.step()
        seconds = time.perf_counter() - start
        if done == len(ids):
            decode.append(1e3 * seconds)
        else:
            prefill.append(1e3 * seconds / update.num_run)
        done = update.prefill[0]
    last = prefill[-CHUNKS - 1 : -1] or prefill  # the very last may be a short one
    return {
        "tokens": len(ids),
        "prefill_ms_per_token": statistics.median(last),
        "prefill_ms_per_token_best": min(last),
        "decode_ms_per_token": statistics.median(decode),
        "decode_ms_per_token_best": min(decode),
        "resident_mb_over_weights": (resident_bytes() - before) / 1e6,
        "peak_mb": peak_bytes() / 1e6,
        "blocks_mb": -(-len(ids) // 128) * engine.memory.block_bytes / 1e6,
    }


def read(results: Path) -> list[dict[str, float]]:
    """Return the figures measured so far."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, tokens: int, chunk: int) -> None:
    """Measure every power of two that is not in the file yet."""
    config = ModelConfig.nano()
    model = Transformer(config)
    randomize(model, 0)
    before = resident_bytes()
    engine = Engine(
        model,
        EngineConfig(
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            max_model_len=tokens,
            cache_bytes=-(-tokens // 128) * 128 * 700,
            disk_path=folder / "cache",
            disk_bytes=32 << 30,
        ),
    )
    rng = random.Random(0)
    ids = [rng.randrange(2, config.vocab_size) for _ in range(tokens)]
    results = folder / "figures.jsonl"
    known = {figure["tokens"] for figure in read(results)}
    length = 4096
    while length <= tokens:
        count = min(length, tokens - DECODED - 2)
        if count not in known:
            found = measure(engine, ids[:count], before)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
        length *= 2
    engine.close()


def plot(figures: list[dict[str, float]], path: Path) -> None:
    """Draw time per token and memory over the length."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figures = sorted(figures, key=lambda f: f["tokens"])
    lengths = [f["tokens"] for f in figures]
    canvas, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("prefill_ms_per_token", "prefill"), ("decode_ms_per_token", "decode")):
        left.plot(lengths, [f[name] for f in figures], marker="o", label=label)
    left.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="ms per token")
    for name, label in (
        ("resident_mb_over_weights", "process, over the weights"),
        ("blocks_mb", "of it, compressed entries"),
    ):
        right.plot(lengths, [f[name] for f in figures], marker="o", label=label)
    right.set(xscale="log", xlabel="context (tokens)", ylabel="MB", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    canvas.suptitle("nano() in float32 on two cores")
    canvas.savefig(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/hadal-long"))
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="draw what has been measured, and do not measure")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(read(arguments.folder / "figures.jsonl"), arguments.plot)
        return
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run(arguments.folder, arguments.tokens, arguments.chunk)


if __name__ == "__main__":
    main()

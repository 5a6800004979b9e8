"""One sequence as it grows: time and memory per token, what of a decoded token takes how long, up to a million tokens.

Real prefill in chunks, then decoding, at every power of two. The state is kept on disk, so that a run
that was stopped goes on where it was; figures are appended to a file as they are measured.

    python benchmarks/long_context.py [--network nano] [--tokens 1048576] [--folder /tmp/hadal-long]
    python benchmarks/long_context.py --network a192 --tokens 131072
    python benchmarks/long_context.py --plot docs/figures/long-context.svg
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from hadal.bench.networks import NETWORKS, network, write_network
from hadal.checkpoint import load
from hadal.engine import Engine, EngineConfig, SamplingParams
from hadal.model import Precision, Transformer
from hadal.model.kernels.decode import PARTS, timed_parts

DECODED = 32
"""Tokens decoded at each length."""
CHUNKS = 16
"""Of the prefill before each length, those that are reported."""
TITLES = {"nano": "nano, float32", "a192": "A192 as stored (FP4, FP8), BF16"}


def status_bytes(field: str) -> int:
    """Return a size of this process that Linux tells: `VmRSS` or `VmHWM`."""
    fields = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(f for f in fields if f.startswith(field)).split()[1]) * 1024


def measure(engine: Engine, ids: list[int], before: int) -> dict[str, object]:
    """Grow the sequence to these tokens, decode a few, and report."""
    engine.add(ids, SamplingParams(temperature=0.0, max_tokens=DECODED + 1, ignore_eos=True))
    prefill: list[float] = []
    decode: list[float] = []
    parts: list[list[float]] = []
    done = None
    while engine.has_work:
        start = time.perf_counter()
        with timed_parts() as spent:
            [update] = engine.step()
        seconds = time.perf_counter() - start
        if done == len(ids):
            decode.append(1e3 * seconds)
            parts.append([1e3 * part for part in spent])
        else:
            prefill.append(1e3 * seconds / update.num_run)
        done = update.prefill[0]
    last = prefill[-CHUNKS - 1 : -1] or prefill  # the very last may be a short one
    medians = [statistics.median(part) for part in zip(*parts, strict=True)]
    whole = statistics.median(decode)
    return {
        "tokens": len(ids),
        "prefill_ms_per_token": statistics.median(last),
        "prefill_ms_per_token_best": min(last),
        "decode_ms_per_token": whole,
        "decode_ms_per_token_best": min(decode),
        "parts_ms": dict(zip(PARTS, medians, strict=True)) | {"else": whole - sum(medians)},
        "resident_mb_over_weights": (status_bytes("VmRSS") - before) / 1e6,
        "peak_mb": status_bytes("VmHWM") / 1e6,
        "blocks_mb": -(-len(ids) // 128) * engine.memory.block_bytes / 1e6,
    }


def read(folder: Path, name: str) -> list[dict]:
    """Return the figures measured so far, by length."""
    results = folder / f"{name}.jsonl"
    if not results.exists():
        return []
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda figure: figure["tokens"])


def model_of(name: str, folder: Path) -> Transformer:
    """Return the network; A192 as a published checkpoint is stored."""
    if name == "nano":
        return network("nano")
    if not (folder / "stored").exists():
        write_network("a192", folder, ["stored"])
    return load(folder / "stored", dtype=torch.bfloat16, precision=Precision.exact())


def run(name: str, folder: Path, tokens: int, chunk: int) -> None:
    """Measure every power of two that is not in the file yet."""
    model = model_of(name, folder)
    before = status_bytes("VmRSS")
    engine = Engine(
        model,
        EngineConfig(
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            max_model_len=tokens,
            cache_bytes=-(-tokens // 128) * 128 * 2000,
            disk_path=folder / f"{name}.cache",
            disk_bytes=32 << 30,
        ),
    )
    rng = random.Random(0)
    ids = [rng.randrange(2, NETWORKS[name].vocab_size) for _ in range(tokens)]
    known = {figure["tokens"] for figure in read(folder, name)}
    length = 1024
    while length <= tokens:
        count = min(length, tokens - DECODED - 2)
        if count not in known:
            found = measure(engine, ids[:count], before)
            with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
        length *= 2
    engine.close()


def plot(folder: Path, path: Path) -> None:
    """Draw time per token and its parts over the length, and memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    known = {name: read(folder, name) for name in TITLES}
    canvas, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    times, memory = axes[0]
    for (name, figures), color in zip(known.items(), ("C0", "C1"), strict=True):
        lengths = [f["tokens"] for f in figures]
        for key, style in (("decode", "o-"), ("prefill", "o:")):
            values = [f[f"{key}_ms_per_token"] for f in figures]
            times.plot(lengths, values, style, color=color, label=f"{name}: {key}")
        values = [f["resident_mb_over_weights"] for f in figures]
        memory.plot(lengths, values, "o-", color=color, label=f"{name}: over the weights")
        values = [f["blocks_mb"] for f in figures]
        memory.plot(lengths, values, "o:", color=color, label=f"{name}: of it, entries")
    times.set(yscale="log", ylabel="ms per token")
    memory.set(ylabel="MB", ylim=(0, None))
    for axis, (name, figures) in zip(axes[1], known.items(), strict=True):
        parts = list(zip(*(f["parts_ms"].values() for f in figures), strict=True))
        labels = ["all else" if part == "else" else part for part in figures[0]["parts_ms"]]
        axis.stackplot([f["tokens"] for f in figures], parts, labels=labels, alpha=0.8)
        axis.set(ylabel="ms per decoded token", ylim=(0, None), title=TITLES[name])
    for axis in axes.flat:
        axis.set(xscale="log", xlabel="context (tokens)")
        axis.grid(alpha=0.3)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "fontsize": "small"}
    times.legend(**above, frameon=False)
    memory.legend(**above, frameon=False)
    parts = axes[1, 1].get_legend_handles_labels()
    canvas.legend(*parts, loc="outside lower center", ncols=len(parts[0]), frameon=False)
    canvas.savefig(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=TITLES, default="nano")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/hadal-long"))
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="draw what has been measured, and do not measure")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(arguments.folder, arguments.plot)
        return
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run(arguments.network, arguments.folder, arguments.tokens, arguments.chunk)


if __name__ == "__main__":
    main()

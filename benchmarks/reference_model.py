"""How fast the readable model is, beside transformers, on the same weights in the same run.

    python benchmarks/reference_model.py [--repeat N] [--json]

Neither is built for speed; the table says what the later fast paths start from. nano's widths,
random weights, float32, the same threads; runs alternate, the median and the range are shown. The
physical limit is the time that the machine's own float32 matrix products (measured in the same run)
would need for the FLOPs of `hadal cost`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hadal.checkpoint import load, save
from hadal.cost.flops import flops_per_token
from hadal.model import ModelConfig, Transformer, randomize

LENGTHS = (512, 2048)
CHUNK = 512


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


def gemm_rate(size: int = 1024) -> float:
    """Return FLOP/s of a float32 product, best of five."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(5))


def ours(model: Transformer, ids: torch.Tensor) -> tuple[float, float]:
    """Return seconds of a chunked prefill and of one decoded token after it."""
    cache = model.new_cache()

    def prefill() -> None:
        for chunk in ids.split(CHUNK):
            model.streams(chunk, [len(chunk)], [cache])

    def decode() -> None:
        for token in ids[:8].split(1):
            model(token, [1], [cache])

    return timed(prefill), timed(decode) / 8


def theirs(peer: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Return the same of transformers, with its own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)

    def step(chunk: torch.Tensor) -> None:
        peer(chunk[None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prefill() -> None:
        for chunk in ids.split(CHUNK):
            step(chunk)

    def decode() -> None:
        for token in ids[:8].split(1):
            step(token)

    return timed(prefill), timed(decode) / 8


@torch.no_grad()
def measure(repeat: int) -> list[dict[str, object]]:
    """Return one row for each length and implementation."""
    from transformers import DeepseekV4ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.nano()
        model = Transformer(config)
        randomize(model, 0)
        save(model, Path(folder) / "nano", layout="huggingface")
        peer = DeepseekV4ForCausalLM.from_pretrained(
            Path(folder) / "nano", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        runners = {
            "hadal": (ours, load(Path(folder) / "nano")),
            "transformers": (theirs, peer),
        }
        rows = []
        for length in LENGTHS:
            ids = torch.randint(0, config.vocab_size, (length,), generator=torch.manual_seed(0))
            samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
            for _ in range(repeat + 1):
                for name, (run, network) in runners.items():
                    samples[name].append(run(network, ids))
            per_token = sum(f.count for f in flops_per_token(config, length // 2))
            floor = per_token * length / gemm_rate()
            for name, values in samples.items():
                prefill, decode = zip(*values[1:], strict=True)  # the first warms up
                rows.append(row(name, length, prefill, decode, floor))
        return rows


def row(
    name: str, length: int, prefill: tuple[float, ...], decode: tuple[float, ...], floor: float
) -> dict[str, object]:
    """Return medians and ranges of one implementation."""
    return {
        "name": name,
        "length": length,
        "prefill_tokens_per_s": length / statistics.median(prefill),
        "prefill_range_s": [min(prefill), max(prefill)],
        "decode_ms": 1e3 * statistics.median(decode),
        "decode_range_ms": [1e3 * min(decode), 1e3 * max(decode)],
        "prefill_share_of_limit": floor / statistics.median(prefill),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.repeat)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, float32, nano widths, median of {arguments.repeat}"
    )
    print(
        f"{'':13} {'length':>6} {'prefill tok/s':>14} {'of limit':>9} {'decode ms':>10}  range ms"
    )
    for r in rows:
        low, high = r["decode_range_ms"]
        print(
            f"{r['name']:13} {r['length']:6} {r['prefill_tokens_per_s']:14,.0f} "
            f"{r['prefill_share_of_limit']:9.1%} {r['decode_ms']:10.1f}  {low:.0f}..{high:.0f}"
        )


if __name__ == "__main__":
    main()

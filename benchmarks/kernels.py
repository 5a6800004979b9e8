"""Kernels beside the modules that they stand for: products with stored matrices, hyper-connections, and whole steps of nano.

    python benchmarks/kernels.py --rounds 20 --threads 1

Both sides take turns, in this process, on the same numbers. Prints how fast this machine reads memory, and a table of
medians with the range of the middle half. HADAL_CPU_KERNELS=avx2 or plain takes another form of them.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from hadal.checkpoint import load
from hadal.config import ModelConfig
from hadal.model import kernels, mhc, quant
from hadal.model.kernels import mixing, native, products
from hadal.model.product import product
from hadal.nano import nano_checkpoint

HIDDEN = 512
"""Of the matrices, 512 x 512, and of the streams, four of 512 columns."""
CONTEXT = 1024


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    form = native.LEVELS[native.level()]
    print(f"{form}, {options.threads} threads; reading memory: {read_rate():.1f} GB/s")
    print(f"{'':<34}{'kernel':>22}{'modules':>22}{'times':>7}")
    with torch.inference_mode():
        for rows in (1, 8, 128, 512):
            for name in ("FP4", "FP8"):
                show(f"{name}, {rows} rows, us", 1e6, *matrices(name, rows), options.rounds)
        for rows in (1, 512):
            show(f"hyper-connections, {rows} rows, us", 1e6, *streams(rows), options.rounds)
        show("nano, a token, ms", 1e3, *steps(1), options.rounds)
        show(
            f"nano, {CONTEXT} tokens at once, ms", 1e3, *steps(CONTEXT), max(3, options.rounds // 4)
        )


def read_rate() -> float:
    """Return how many GB of memory are read in a second."""
    data = torch.ones(1 << 27)
    return 4 * data.numel() / min(seconds(data.sum) for _ in range(5)) / 1e9


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def show(
    name: str, unit: float, kernel: Callable[[], object], modules: Callable[[], object], rounds: int
) -> None:
    """Let both take turns, and print a row."""
    sides: dict[str, list[float]] = {"kernel": [], "modules": []}
    for _ in range(rounds + 2):
        sides["kernel"].append(unit * seconds(kernel))
        sides["modules"].append(unit * seconds(modules))
    texts: list[str] = []
    for values in sides.values():
        low, middle, high = statistics.quantiles(values[2:], n=4)
        texts.append(f"{middle:,.1f} ({low:,.1f} to {high:,.1f})")
    ratio = statistics.median(sides["modules"][2:]) / statistics.median(sides["kernel"][2:])
    print(f"{name:<34}{texts[0]:>22}{texts[1]:>22}{ratio:>7.1f}", flush=True)


def matrices(name: str, rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a product with a stored matrix, inputs rounded, in both ways."""
    x, weight = torch.randn(rows, HIDDEN), torch.randn(HIDDEN, HIDDEN)
    codes, scale = (quant.quantize_fp4 if name == "FP4" else quant.quantize_fp8)(weight)
    unpack = quant.dequantize_fp4 if name == "FP4" else quant.dequantize_fp8
    return (
        lambda: products.native_product(x, codes, scale, rounds=True),
        lambda: product(quant.round_trip_activations(x), unpack(codes, scale)),
    )


def streams(rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return reading and writing of a site, in both ways."""
    config = dataclasses.replace(ModelConfig.nano(), hidden_size=HIDDEN)
    m = config.hc_mult
    fn, base, scale = torch.randn((2 + m) * m, m * HIDDEN), torch.randn((2 + m) * m), torch.ones(3)
    given, output = torch.randn(rows, m, HIDDEN), torch.randn(rows, HIDDEN)

    def kernel() -> None:
        found = mixing.mhc_read(given, fn, base, scale, config)
        assert found is not None
        mixing.mhc_write(given, output, found[1])

    def modules() -> None:
        mix = mhc.mixture(given, fn, base, scale, config)
        mhc.read(given, mix)
        mhc.write(given, output, mix, in_float32=True)

    return kernel, modules


def steps(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a pass of nano over so many tokens: one after a context, or all at once."""
    model = load(nano_checkpoint())
    ids = torch.randint(3, 2000, (CONTEXT,))
    cache = model.new_cache()
    if tokens == 1:
        model(ids[:256], [256], [cache])

    def kernel() -> None:
        model(ids[:tokens], [tokens], [cache if tokens == 1 else model.new_cache()])

    def modules() -> None:
        with kernels.without_kernels():
            kernel()

    return kernel, modules


if __name__ == "__main__":
    main()

"""What a run has written down of its steps: read, as a line of text, and as a plot."""

import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from hadal.errors import ConfigError, StorageError

__all__ = ["METRICS", "plot", "read_metrics", "sparkline"]

METRICS = "metrics.jsonl"
"""In the folder of a run: a line for each step."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_LOSSES = {"language": "next token", "mtp": "token after", "indexer": "indexer"}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of every step that a run has taken; a last line that is half written is left out.

    Raises:
        StorageError: There are none, or they cannot be read.
    """
    try:
        lines = (folder / METRICS).read_text().splitlines()
    except OSError as error:
        raise StorageError(
            f"no training run in {folder}: {error}", hint="name the folder that it writes into"
        ) from error
    rows: list[dict[str, float]] = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as a row of blocks, medians of equal parts, on a logarithmic scale."""
    if not values:
        return ""
    bounds = [at * len(values) // width for at in range(width + 1)]
    parts = [values[a:b] for a, b in pairwise(bounds) if b > a]
    levels = [math.log(max(statistics.median(part), 1e-9)) for part in parts]
    low, span = min(levels), (max(levels) - min(levels)) or 1.0
    return "".join(_BLOCKS[round((level - low) / span * (len(_BLOCKS) - 1))] for level in levels)


def plot(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the losses by step.

    Args:
        rows: From `read_metrics`.
        path: File to write, .svg or .png.

    Raises:
        ConfigError: matplotlib is not installed, or does not know the suffix, or cannot write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed", hint="pip install 'hadal[plot]'"
        ) from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for name, title in _LOSSES.items():
        axes.plot(steps, [max(row[name], 1e-9) for row in rows], label=title, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error

"""The two curves of the report's Figure 1: FLOPs of a token, and KV, against context length."""

from pathlib import Path

from hadal.cost.baselines import Gqa8
from hadal.cost.estimate import kv_bytes, model_flops, resolve, weighted
from hadal.cost.flops import CONVENTIONS
from hadal.errors import ConfigError

__all__ = ["draw"]

_POINTS = 128


def draw(
    names: list[str],
    context: int,
    path: Path,
    *,
    convention: str = "fp8-equivalent",
    kv_format: str = "fp8-fp4",
) -> None:
    """Write the figure as the suffix of `path` says, .png or .svg (or what matplotlib knows).

    Args:
        names: Models, as `estimate` takes them.
        context: Right end of the horizontal axis, in tokens.
        path: File to write.
        convention: Of the FLOPs.
        kv_format: Of the V4 models.

    Raises:
        ConfigError: matplotlib is not installed, does not know the suffix, or a model is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError(
            "plots need matplotlib, which is not installed", hint="pip install 'hadal[plot]'"
        ) from err
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = [max(1, context * i // _POINTS) for i in range(_POINTS + 1)]
    for name in names:
        model = resolve(name)
        if not isinstance(model, Gqa8):
            left.plot(
                lengths,
                [weighted(model_flops(model, n), convention) / 1e12 for n in lengths],
                label=name,
            )
        right.plot(lengths, [kv_bytes(model, n, kv_format) / 1e9 for n in lengths], label=name)
    left.set(title="FLOPs of one token", xlabel="context (tokens)", ylabel="TFLOP")
    right.set(title="KV cache of one sequence", xlabel="context (tokens)", ylabel="GB")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        axes.set_xlim(0, context)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(_thousands)
        axes.set_xticks([context * i // 4 for i in range(5)])
    figure.suptitle(f"{convention}: {CONVENTIONS[convention].text}", fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as err:
        raise ConfigError(f"cannot write the plot {path}: {err}") from err


def _thousands(tokens: float, _: int) -> str:
    return f"{tokens / 1024:,.0f}K"

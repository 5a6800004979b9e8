"""`hadal checkpoint`: convert between layouts and formats, make random ones, look inside."""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from hadal.cli.quantities import human_bytes

if TYPE_CHECKING:
    from hadal.checkpoint.writer import Progress as ProgressCallback

__all__ = ["app"]

app = App(name="checkpoint", help="Convert, make and inspect checkpoints.")
Json = Annotated[bool, Parameter(name="--json", negative="")]


@app.command
def convert(
    source: Path,
    target: Path,
    *,
    layout: Literal["official", "huggingface"] = "official",
    weights: Literal["instruct", "base", "plain"] | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    mtp: bool = True,
    shard_bytes: int = 5 * 10**9,
    json_output: Json = False,
) -> None:
    """Rewrite a checkpoint in another layout or stored format, one tensor at a time.

    Examples:
        hadal checkpoint convert DeepSeek-V4-Flash flash-hf --layout huggingface

        hadal checkpoint convert flash-hf flash-bf16 --weights plain --dtype bfloat16

    Args:
        source: Folder with config.json and safetensors files, in either layout.
        target: Folder to make; it appears when it is complete.
        layout: Names and stacking of the result.
        weights: instruct: FP4 experts, FP8 rest; base: FP8; plain: floats. Default: as in SOURCE.
        dtype: Of tensors that are not quantised. Default: as in SOURCE.
        mtp: --no-mtp leaves the draft modules out, also those of DSpark checkpoints.
        shard_bytes: Tensor bytes of one file.
        json_output: Print the result as JSON.
    """
    import torch

    from hadal.checkpoint import convert as run

    with _progress_bar(f"{source} -> {target}") as progress:
        run(
            source,
            target,
            layout=layout,
            weights=weights,
            dtype=getattr(torch, dtype) if dtype else None,
            mtp=mtp,
            max_shard_bytes=shard_bytes,
            progress=progress,
        )
    inspect(target, json_output=json_output)


@app.command
def make(
    target: Path,
    *,
    size: Literal["nano", "small-flash", "small-pro"] = "nano",
    weights: Literal["instruct", "base", "plain"] = "instruct",
    layout: Literal["official", "huggingface"] = "official",
    seed: int = 0,
    json_output: Json = False,
) -> None:
    """Make a checkpoint of random weights: real names, dtypes and scales, small widths.

    Examples:
        hadal checkpoint make /tmp/flash --size small-flash

    Args:
        target: Folder to make.
        size: nano, or Flash or Pro with all their layers and mechanisms at small widths.
        weights: instruct: FP4 experts, FP8 rest; base: FP8, float32 scales; plain: floats.
        layout: Names and stacking.
        seed: Of the weights.
        json_output: Print the result as JSON.
    """
    from hadal.checkpoint import make_random
    from hadal.config import ModelConfig

    config = {
        "nano": ModelConfig.nano,
        "small-flash": lambda: ModelConfig.v4_flash().narrowed(),
        "small-pro": lambda: ModelConfig.v4_pro().narrowed(),
    }[size]()
    config = config.plain() if weights == "plain" else config.quantized(weights)
    make_random(config, target, seed=seed, layout=layout)
    inspect(target, json_output=json_output)


@app.command
def inspect(
    path: Path, *, tensors: bool = False, mtp: bool = True, json_output: Json = False
) -> None:
    """Show what a checkpoint holds, and whether it is complete.

    Examples:
        hadal checkpoint inspect flash-hf --tensors

    Args:
        path: Folder with config.json and safetensors files, in either layout.
        tensors: List every tensor under its official name.
        mtp: --no-mtp leaves the draft modules out.
        json_output: Print JSON.
    """
    from hadal.checkpoint import CheckpointSource, tensor_specs
    from hadal.checkpoint.load import read_checkpoint_config
    from hadal.checkpoint.reformat import Reformatted, check_complete
    from hadal.checkpoint.specs import plain_dtype

    with CheckpointSource.open(path) as source:
        config = read_checkpoint_config(path, source, mtp=mtp)
        if not mtp:
            source.drop_mtp()
        target = tensor_specs(config, plain_dtype(source.specs))
        check_complete(path, source, Reformatted(source, target), target)
        specs = source.specs
    total = sum(spec.num_bytes for spec in specs.values())
    summary: dict[str, Any] = {
        "path": str(path),
        "tensors": len(specs),
        "bytes": total,
        "experts": config.expert_dtype or "plain",
        "layers": [kind.value for kind in config.layer_kinds],
        "mtp_blocks": config.num_nextn_predict_layers,
    }
    if tensors:
        summary["specs"] = {name: str(spec) for name, spec in specs.items()}
    if json_output:
        print(json.dumps(summary))  # noqa: T201 - data goes to stdout
        return
    console = Console(highlight=False)
    console.print(
        f"{path}: {len(specs):,} tensors, {human_bytes(total)}, "
        f"experts {summary['experts']}, {config.num_hidden_layers} layers, complete",
        markup=False,
    )
    for name, spec in summary.get("specs", {}).items():
        console.print(f"  {name}: {spec}", markup=False)


@contextlib.contextmanager
def _progress_bar(title: str) -> "Generator[ProgressCallback]":
    """Show a bar on a terminal; elsewhere nothing."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""`hadal train`: a small V4 from demonstrations."""

import dataclasses
import json
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.train.train_config import TrainConfig

__all__ = ["TrainOptions", "app", "follow"]

app = App(
    name="train",
    help="Train a small V4 on demonstrations, see how it goes, and write its checkpoint.",
)
_LAST = 15
"""Steps whose median is said to be the loss."""


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How it is trained. The rest is what `recipes/nano.py` has.

    Attributes:
        steps: Optimiser steps.
        tokens: Of a step, in each worker, and of the longest samples.
        longest: Leave out tasks of more tokens. Default: all must fit into a sample.
        peak_lr: Learning rate after the warm-up; it ends at a twentieth of it.
        narrow_share: Share of steps whose windows are narrower than the model's.
        optimizer: Muon for matrices and AdamW for the rest, or AdamW alone.
        workers: Processes that share every step.
        device: Where they compute; with cuda each has a GPU of its own.
        seed: Of weights and samples.
    """

    steps: int = 1500
    tokens: int = 4096
    longest: int | None = None
    peak_lr: float = 4e-3
    narrow_share: float = 0.7
    optimizer: Literal["muon", "adamw"] = "muon"
    workers: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 1

    def config(self, model: Any, output: Path) -> "TrainConfig":
        """Return the settings of a run.

        Raises:
            ConfigError: They do not fit together.
        """
        from hadal.train.train_config import TrainConfig

        return TrainConfig(
            model=model, output=output, steps=self.steps, tokens_per_worker=self.tokens,
            lengths=((0.0, max(1, self.tokens // 2)), (0.7, self.tokens)), peak_lr=self.peak_lr,
            final_lr=self.peak_lr / 20, warmup_steps=min(100, max(1, self.steps // 10)), decay_from=0.6,
            sparse_from=0.45, narrow_share=self.narrow_share, optimizer=self.optimizer, workers=self.workers,
            device=self.device, seed=self.seed,
        )  # fmt: skip


@app.command
def run(
    demonstrations: Path,
    *,
    tokenizer: Path,
    into: Path,
    model: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
    options: TrainOptions | None = None,
) -> None:
    r"""Train, or go on with a run that was stopped, killed or cut off.

    Examples:
        hadal train run demonstrations.jsonl.gz --tokenizer tokenizer.json \
            --into run --longest 4096

        hadal train run demonstrations.jsonl.gz --tokenizer tokenizer.json \
            --into run --tokens 18432 --device cuda --workers 1

    Args:
        demonstrations: A file of conversations, as `recipes/nano.py` makes it.
        tokenizer: Its tokenizer.json.
        into: Folder of the run: state, metrics, configuration.
        model: A config.json with the sizes of the network. Default: those of nano.
        json_output: Print the metrics of every step as a line of JSON.
        options: How it is trained.
    """
    from hadal.config import ModelConfig
    from hadal.train.export import keep_config
    from hadal.train.samples import Conversations
    from hadal.train.tokenizer import vocabulary_size

    size = vocabulary_size(tokenizer)
    sizes = ModelConfig.from_upstream(model) if model else ModelConfig.nano()
    if model and sizes.vocab_size < size:
        raise ConfigError(f"{model}: vocab_size is {sizes.vocab_size}, the tokenizer has {size}")
    options = options or TrainOptions()
    config = options.config(sizes if model else dataclasses.replace(sizes, vocab_size=size), into)
    keep_config(config.model, tokenizer, into)
    follow(
        config,
        partial(
            Conversations.demonstrated,
            demonstrations,
            tokenizer=tokenizer,
            seed=options.seed,
            longest=options.longest,
        ),
        json_output,
    )


def follow(config: "TrainConfig", data: Any, json_output: bool = False) -> None:
    """Train, and show how it goes: how far it is, its loss, and the loss of all its steps as a plot.

    Args:
        config: Of the run.
        data: As `train` takes it.
        json_output: Print every step instead.
    """
    from hadal.train.launch import train
    from hadal.train.metrics import METRICS, read_metrics, sparkline

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    there = (config.output / METRICS).exists()
    losses = [row["language"] for row in read_metrics(config.output)] if there else []
    bar, curve = Progress(*columns, console=console), Text(no_wrap=True)
    shown = bar.add_task("training", total=config.steps, completed=len(losses))

    def progress(metrics: dict[str, float]) -> None:
        losses[int(metrics["step"]) - 1 :] = [metrics["language"]]
        recent = statistics.median(losses[-_LAST:])
        bar.update(shown, completed=len(losses), description=f"training, loss {recent:.3f}")
        curve.plain = f"{losses[0]:.2f} {sparkline(losses, 60)} {losses[-1]:.3f}"
        if json_output:
            print(json.dumps(metrics), flush=True)  # noqa: T201 - data goes to stdout

    with Live(Group(bar, curve), console=console, refresh_per_second=2, transient=False):
        train(config, data, progress)


@app.command
def show(
    folder: Path,
    *,
    plot: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Say how far a run is and how its losses went; it may be running.

    Examples:
        hadal train show run

        hadal train show run --plot losses.svg

    Args:
        folder: Of the run.
        plot: Draw the losses into this file, .svg or .png.
        json_output: Print one JSON object.
    """
    from hadal.train.metrics import plot as draw
    from hadal.train.metrics import read_metrics, sparkline

    rows = read_metrics(folder)
    if not rows:
        raise ConfigError(f"the run in {folder} has taken no step yet", hint="wait for the first")
    last = rows[-_LAST:]
    found = {key: statistics.median(row[key] for row in last) for key in ("language", "mtp", "indexer", "seconds", "lr")}  # fmt: skip
    if plot is not None:
        draw(rows, plot)
    if json_output:
        print(json.dumps({"steps": len(rows), **found}))  # noqa: T201 - data goes to stdout
        return
    console = Console(highlight=False)
    console.print(f"{len(rows):,} steps, {found['seconds']:.2f} s each, learning rate {found['lr']:.1e}")  # fmt: skip
    for name in ("language", "mtp", "indexer"):
        values = [row[name] for row in rows]
        line = f"{name:<9}{values[0]:8.3f} {sparkline(values, 60)} {found[name]:.4f}"
        console.print(line, soft_wrap=True)


@app.command
def export(folder: Path, checkpoint: Path, *, plain: Annotated[bool, Parameter(negative="")] = False) -> None:  # fmt: skip
    """Write the network of a run as a checkpoint, as it is now.

    Examples:
        hadal train export run my-nano && hadal chat my-nano

    Args:
        folder: Of the run.
        checkpoint: Folder to make.
        plain: Keep all weights as they are, instead of FP4 experts and FP8 matrices.
    """
    from hadal.config import ModelConfig
    from hadal.train.export import export as write

    config = ModelConfig.from_upstream(folder)
    write(config, folder, folder / "tokenizer.json", checkpoint, plain=plain)
    Console(stderr=True).print(f"wrote {checkpoint}", markup=False, soft_wrap=True)

"""The same network trained by Muon, by AdamW alone, and with one residual stream instead of four: loss by step.

    python benchmarks/training_curves.py --work DIR --steps 300 --plot docs/figures/training.svg

DIR is the folder of `recipes/nano.py`; its demonstrations and tokenizer are used. Every run sees the same samples in the
same order, from the same seed, with the rate of the recipe held after its warm-up of 100 steps; AdamW also has rates
of its own. Windows are not narrowed and attention stays dense, other than in the recipe. With one stream, hyper-connections are a plain residual connection with two learned gates. A run that is
there is not made again; one that was stopped goes on.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.nano import VOCABULARY
from rich.console import Console
from rich.progress import Progress

from hadal.config import ModelConfig
from hadal.train.launch import train
from hadal.train.samples import Conversations
from hadal.train.train_config import TrainConfig

LENGTH = 2048
"""Tokens of every sample; longer tasks are left out."""
SMOOTHED = 15
"""Steps of which the median is drawn."""


def main() -> None:
    """Train what is not trained yet, print the last losses, and draw them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of recipes/nano.py")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    work: Path = options.work
    data = partial(
        Conversations.demonstrated,
        work / "demonstrations.jsonl.gz",
        tokenizer=work / "tokenizer.json",
        longest=LENGTH,
    )
    curves: dict[str, list[float]] = {}
    for name, config in runs(work / "curves", options.steps).items():
        with Progress(console=Console(stderr=True)) as bar:
            shown = bar.add_task(name, total=config.steps)
            train(config, data, lambda m, b=bar, s=shown: b.update(s, completed=m["step"]))
        lines = (config.output / "metrics.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line)["language"] for line in lines]
        last = curves[name][-SMOOTHED:]
        print(json.dumps({
            "run": name, "steps": len(lines), "loss": round(statistics.median(last), 4),
            "low": round(min(last), 4), "high": round(max(last), 4),
        }), flush=True)  # fmt: skip
    if options.plot:
        draw(curves, options.plot)


def runs(folder: Path, steps: int) -> dict[str, TrainConfig]:
    """Return the runs by name."""
    model = dataclasses.replace(ModelConfig.nano(), vocab_size=VOCABULARY)
    muon = TrainConfig(
        model=model, output=folder / "muon", steps=steps, tokens_per_worker=LENGTH, lengths=((0.0, LENGTH),),
        decay_from=1.0, sparse_from=1.0, quantize_from=2.0,
    )  # fmt: skip
    one_stream = dataclasses.replace(model, hc_mult=1)
    return {
        "Muon": muon,
        "AdamW, rate 4e-3": dataclasses.replace(muon, optimizer="adamw", output=folder / "adamw-4e-3"),
        "AdamW, rate 1e-3": dataclasses.replace(muon, optimizer="adamw", peak_lr=1e-3, output=folder / "adamw-1e-3"),
        "Muon, one stream": dataclasses.replace(muon, model=one_stream, output=folder / "one-stream"),
    }  # fmt: skip


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Write the plot."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "hadal"
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, losses in curves.items():
        smooth = [
            statistics.median(losses[max(0, at - SMOOTHED + 1) : at + 1])
            for at in range(len(losses))
        ]
        axes.plot(range(1, len(losses) + 1), smooth, label=name)
    axes.set(xlabel="step (4,096 tokens)", ylabel="loss of what the model says, nats a token", yscale="log")  # fmt: skip
    axes.set_yticks([1, 2, 3, 4, 6, 8], labels=["1", "2", "3", "4", "6", "8"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""nano, from nothing: demonstrations in real boxes, a tokenizer, training, and a checkpoint.

    python recipes/nano.py --work DIR

Every part that is there already is kept, so that the same command goes on where it was.
"""

import argparse
import asyncio
import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hadal.agent import SYSTEM_PROMPT
from hadal.chat import SystemMessage, Tool
from hadal.config import ModelConfig
from hadal.encoding import Encoding
from hadal.tasks import FAMILIES
from hadal.tools import BashTool, EditorTool
from hadal.train.demonstrations import collect, read
from hadal.train.export import export
from hadal.train.launch import train
from hadal.train.samples import Conversations
from hadal.train.tokenizer import train_tokenizer
from hadal.train.train_config import TrainConfig

VOCABULARY = 2048
FIRST_SEED = 1000
CONTROLS = re.compile("<｜[^｜]*｜>|</?think>|｜DSML｜")
TOOLS: tuple[Tool, ...] = (BashTool.declare(), EditorTool.declare())


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--tasks", type=int, default=350, help="demonstrations of each family")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    work: Path = options.work
    demonstrations, tokenizer = work / "demonstrations.jsonl.gz", work / "tokenizer.json"
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        if not demonstrations.exists():
            tasks = [(f, FIRST_SEED + n) for n in range(options.tasks) for f in FAMILIES]
            shown = bar.add_task("demonstrations", total=len(tasks))
            asyncio.run(
                collect(tasks, demonstrations, progress=lambda n: bar.update(shown, completed=n))
            )
        if (there := sum(1 for _ in read(demonstrations))) != options.tasks * len(FAMILIES):
            parser.error(
                f"{demonstrations} has {there:,} tasks: give --tasks {there // len(FAMILIES)}, or another folder"
            )
        if not tokenizer.exists():
            train_tokenizer(texts(demonstrations), VOCABULARY, tokenizer)
        config = TrainConfig(
            model=dataclasses.replace(ModelConfig.nano(), vocab_size=VOCABULARY),
            output=work / "run", steps=options.steps, workers=options.workers,
            lengths=((0.0, 2048), (0.7, 4096)), decay_from=0.6, sparse_from=0.45, narrow_share=0.7,
        )  # fmt: skip
        shown = bar.add_task("training", total=config.steps)

        def progress(metrics: dict[str, float]) -> None:
            about = f"training, loss {metrics['language']:.3f}"
            bar.update(shown, completed=int(metrics["step"]), description=about)

        train(config, partial(conversations, demonstrations, tokenizer), progress)
    for name in ("nano", "nano-fp32"):
        if not (work / name).exists():
            export(config.model, config.output, tokenizer, work / name, plain=name != "nano")
    console.print(f"the checkpoint is {work / 'nano'}", markup=False)


def texts(demonstrations: Path) -> Iterator[str]:
    """Yield what the tokenizer is to be good at; what every prompt begins with now and then only."""
    encoding = Encoding.load("v4")
    system = SystemMessage(SYSTEM_PROMPT, tools=TOOLS)
    for number, shown in enumerate(read(demonstrations)):
        messages = [system, *shown.messages] if number % 50 == 0 else list(shown.messages)
        text = encoding.render(messages, mode="thinking", drop_thinking=False)
        yield from (part for part in CONTROLS.split(text) if part)


def conversations(demonstrations: Path, tokenizer: Path) -> Conversations:
    """Return what is trained on."""
    encoding = Encoding.load("v4", tokenizer=tokenizer)
    return Conversations(
        encoding, TOOLS, [shown.messages for shown in read(demonstrations)], seed=1
    )


if __name__ == "__main__":
    main()

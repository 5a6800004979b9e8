"""nano, from nothing: demonstrations in real boxes, a tokenizer, two trainings, and a checkpoint.

    python recipes/nano.py --work DIR

The first training has tasks of all kinds. The second goes on from it with texts of many facts among them, of which
every turn asks for some: what one fact in a long text teaches is lost among thousands of tokens (dev/LOG.md).
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
from hadal.chat import SystemMessage
from hadal.cli.train import follow
from hadal.config import ModelConfig
from hadal.encoding import Encoding
from hadal.tasks import FAMILIES, TOOLS
from hadal.train.demonstrations import collect, read
from hadal.train.export import export
from hadal.train.samples import Conversations
from hadal.train.tokenizer import train_tokenizer
from hadal.train.train_config import TrainConfig
from hadal.train.trainer import STATE

VOCABULARY = 2048
LONGEST = 18_432
"""Tokens of the longest samples: a fact, and 16,000 tokens behind it."""
FIRST_SEED = 1000
LATE = {"recall_facts": 6000, "recall_fact": 1500}
"""Families of the second training, and demonstrations of each beside those of the first."""
EARLY = [family for family in FAMILIES if family != "recall_facts"]
CONTROLS = re.compile("<｜[^｜]*｜>|</?think>|｜DSML｜")


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--tasks", type=int, default=450, help="demonstrations of each family")
    parser.add_argument(
        "--steps", type=int, default=1500, help="optimiser steps of the first training"
    )
    parser.add_argument("--late-steps", type=int, default=600, help="those of the second")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what trains it")
    options = parser.parse_args()
    work: Path = options.work
    demonstrations, tokenizer = work / "demonstrations.jsonl.gz", work / "tokenizer.json"
    late = work / "late.jsonl.gz"
    if not demonstrations.exists():
        tasks = [(f, FIRST_SEED + n) for n in range(options.tasks) for f in EARLY]
        demonstrate_all("demonstrations", tasks, demonstrations)
    if (there := sum(1 for _ in read(demonstrations))) != options.tasks * len(EARLY):
        each = there // len(EARLY)
        parser.error(
            f"{demonstrations} has {there:,} tasks: give --tasks {each}, or another folder"
        )
    if not tokenizer.exists():
        train_tokenizer(texts(demonstrations), VOCABULARY, tokenizer)
    if not late.exists():
        tasks = [
            (f, FIRST_SEED + options.tasks + n) for f, count in LATE.items() for n in range(count)
        ]
        demonstrate_all("texts with facts", tasks, late)
    workers = 1 if options.device == "cuda" else 2  # a core each; more would be other samples
    config = TrainConfig(
        model=dataclasses.replace(ModelConfig.nano(), vocab_size=VOCABULARY),
        output=work / "run", steps=options.steps, workers=workers, device=options.device,
        tokens_per_worker=8192 // workers, lengths=((0.0, 2048), (0.7, 4096), (0.96, LONGEST)),
        decay_from=0.6, sparse_from=0.45, narrow_share=0.7,
    )  # fmt: skip
    follow(config, partial(Conversations.demonstrated, demonstrations, tokenizer=tokenizer))
    config = dataclasses.replace(
        config, output=work / "late", begin=config.output / STATE, steps=options.late_steps,
        lengths=((0.0, 2048), (0.5, 4096), (0.92, LONGEST)), peak_lr=2e-3, warmup_steps=20, decay_from=0.4,
        sparse_from=0.0, quantize_from=0.6,
    )  # fmt: skip
    follow(config, partial(Conversations.demonstrated, demonstrations, late, tokenizer=tokenizer))
    for name in ("nano", "nano-fp32"):
        if not (work / name).exists():
            export(config.model, config.output, tokenizer, work / name, plain=name != "nano")
    Console(stderr=True).print(f"the checkpoint is {work / 'nano'}", markup=False)


def demonstrate_all(title: str, tasks: list[tuple[str, int]], path: Path) -> None:
    """Do tasks in boxes, and show how far it is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task(title, total=len(tasks))
        asyncio.run(collect(tasks, path, progress=lambda n: bar.update(shown, completed=n)))


def texts(demonstrations: Path) -> Iterator[str]:
    """Yield what the tokenizer is to be good at; what every prompt begins with now and then only."""
    encoding = Encoding.load("v4")
    system = SystemMessage(SYSTEM_PROMPT, tools=TOOLS)
    for number, shown in enumerate(read(demonstrations)):
        messages = [system, *shown.messages] if number % 50 == 0 else list(shown.messages)
        text = encoding.render(messages, mode="thinking", drop_thinking=False)
        yield from (part for part in CONTROLS.split(text) if part)


if __name__ == "__main__":
    main()

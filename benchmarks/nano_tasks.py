"""What nano solves of tasks that no training has seen, beside what can be had without it.

    python benchmarks/nano_tasks.py --work DIR --count 20

DIR is the folder of `recipes/nano.py`: demonstrations for the baselines, the network as it is stored, before it was
rounded to FP4 and FP8, and before its first step. Every row has the same tasks; runs are kept in DIR/results, and the
same command goes on with them as long as all of that is the same. The table goes to standard output as Markdown.
"""

import argparse
import asyncio
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from hadal.agent import AgentConfig, Limits
from hadal.backends import Backend
from hadal.checkpoint import fingerprint, save
from hadal.cli.run import open_model
from hadal.cli.serve import EngineOptions
from hadal.config import ModelConfig
from hadal.encoding import Encoding, note_generation
from hadal.evals import Score, TaskResult, keep_settings, run_tasks, scores, well_formed
from hadal.evals.baselines import Heuristic, NearestDemonstration, RandomCommand
from hadal.evals.policy_backend import Policy, PolicyBackend
from hadal.model import Transformer
from hadal.tasks import FAMILIES, UNSEEN, make_task
from hadal.train.demonstrations import read
from hadal.train.train_config import TrainConfig

ROWS = ("nano", "held", "fp32", "untrained", "nearest", "rules", "random")
TITLES = {
    "nano": "nano", "held": "calls held", "fp32": "fp32", "untrained": "untrained",
    "nearest": "nearest", "rules": "rules", "random": "random",
}  # fmt: skip
FOLDERS = {"nano": "nano", "held": "nano", "fp32": "nano-fp32", "untrained": "untrained"}
"""Checkpoints of rows that have one."""
DEMONSTRATIONS = ("demonstrations.jsonl.gz", "late.jsonl.gz")


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of recipes/nano.py")
    parser.add_argument("--count", type=int, default=20, help="tasks of each family")
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--at-once", type=int, default=8)
    options = parser.parse_args()
    needed = {"nano", *(f for r, f in FOLDERS.items() if r in options.rows and r != "untrained")}
    if missing := sorted(name for name in needed if not (options.work / name).is_dir()):
        parser.error(f"{options.work} has no {', '.join(missing)}: recipes/nano.py makes it")
    console = Console(stderr=True)
    tasks = [
        make_task(family, "test", seed)
        for seed in range(options.count)
        for family in (*FAMILIES, *UNSEEN)
    ]
    found: dict[str, list[TaskResult]] = {}
    for row in options.rows:
        backend, encoding = open_row(row, options.work)
        config = AgentConfig(
            sampling={"temperature": 0.0}, limits=Limits(turns=24, reply=512, window=32 << 10),
            hold_calls=row == "held",
        )  # fmt: skip
        folder = options.work / "results" / row
        keep_settings(
            folder, {"model": digest(row, options.work), "turns": dataclasses.asdict(config)}
        )
        found[row] = asyncio.run(run_row(tasks, backend, encoding, folder, config, options.at_once))
        solved = sum(r.solved for r in found[row])
        console.print(f"{row}: {solved} of {len(tasks)}")
        path = options.work / "results" / f"{row}.json"
        path.write_text(json.dumps([dataclasses.asdict(r) for r in found[row]]))
    print(table(found))


async def run_row(
    tasks: list, backend: Backend, encoding: Encoding, folder: Path, config: AgentConfig, at_once: int
) -> list[TaskResult]:  # fmt: skip
    """Run the tasks with one backend."""
    try:
        return await run_tasks(tasks, backend, encoding, folder, config, at_once=at_once)
    finally:
        await backend.close()


def open_row(row: str, work: Path) -> tuple[Backend, Encoding]:
    """Return what makes the replies of a row."""
    policies: dict[str, Callable[[], Policy]] = {
        "nearest": lambda: NearestDemonstration(shown(work)),
        "rules": Heuristic,
        "random": lambda: RandomCommand(shown(work)),
    }
    if row in policies:
        encoding = Encoding.load("v4", tokenizer=work / "nano")
        return PolicyBackend(policies[row](), encoding), encoding
    if row == "untrained" and not (work / "untrained").exists():
        make_untrained(work)
    front = open_model(str(work / FOLDERS[row]), None, None, EngineOptions())
    return front.backend, front.encoding


def digest(row: str, work: Path) -> str:
    """Return what the replies of a row are made from."""
    if row in FOLDERS:
        return fingerprint(work / FOLDERS[row])
    whole = hashlib.sha256()
    for name in DEMONSTRATIONS:
        whole.update((work / name).read_bytes())
    return whole.hexdigest()


def shown(work: Path) -> list:
    """Return the training demonstrations."""
    return [shown.messages for name in DEMONSTRATIONS for shown in read(work / name)]


def make_untrained(work: Path) -> None:
    """Write nano as it was before the first step."""
    config = ModelConfig.from_upstream(work / "nano")
    partial = work / "untrained.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save(Transformer(config.plain(), seed=TrainConfig.seed), partial, config=config)
    shutil.copy(work / "nano" / "tokenizer.json", partial)
    note_generation(partial, "v4")
    partial.rename(work / "untrained")


def table(found: dict[str, list[TaskResult]]) -> str:
    """Return the shares by family, and the sums, as Markdown."""
    lines = ["| level | family | " + " | ".join(TITLES[r] for r in found) + " |"]
    lines.append("|---|---|" + "---|" * len(found))
    by_row = [scores(results) for results in found.values()]
    for level, family in by_row[0]:
        own = [row[level, family] for row in by_row]
        name = f"*{family}*" if family in UNSEEN else family
        cells = [f"{score.solved}/{score.count}" for score in own]
        lines.append(f"| {level} | {name} | " + " | ".join(cells) + " |")
    for title, unseen in (("**trained families**", False), ("*families not trained on*", True)):
        cells = [
            str(Score.of(r for r in rs if (r.family in UNSEEN) == unseen)) for rs in found.values()
        ]
        lines.append(f"| | {title} | " + " | ".join(cells) + " |")
    counts = [well_formed(results) for results in found.values()]
    cells = [f"{good / of:.2%} of {of:,}" if of else "none made" for good, of in counts]
    lines.append("| | calls well-formed | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

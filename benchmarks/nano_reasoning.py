"""Does nano need what it thought in the first turn? The same tasks with its reasoning kept, and taken away.

    python benchmarks/nano_reasoning.py --work DIR --count 20

`carry_choice`: a name is found in the first turn, thought of and told to nobody, the file that it came from is
deleted, and turns later it is asked for. "solved" is the check of the box: the name was the right one. "same name as thought of at
first" is whether the name that was written at the end is the one that was thought of at first, right or not. What the
first command printed stays in the context in both rows. Runs are kept in DIR; one JSON object a row.
"""

import argparse
import asyncio
import json
import re
from pathlib import Path

from hadal.agent import AgentConfig, Limits, read_events
from hadal.cli.run import open_model
from hadal.cli.run_settings import model_identity
from hadal.cli.serve import EngineOptions
from hadal.evals import interval, keep_settings, run_tasks
from hadal.evals.task_run import journal_path
from hadal.tasks import make_task


def main() -> None:
    """Run what has not been run, and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()
    tasks = [make_task("carry_choice", "test", seed) for seed in range(options.count)]
    for keep in (True, False):
        folder = options.work / ("kept" if keep else "dropped")
        keep_settings(folder, {"model": model_identity(options.model), "keep_reasoning": keep})
        config = AgentConfig(
            sampling={"temperature": 0.0}, limits=Limits(turns=24, reply=512, window=32 << 10),
            keep_reasoning=keep,
        )  # fmt: skip
        results = asyncio.run(run_all(tasks, folder, config, options.model))
        same = sum(is_same(journal_path(folder, task)) for task in tasks)
        print(json.dumps({
            "reasoning": "kept" if keep else "dropped", "of": len(tasks),
            "solved": sum(r.solved for r in results), "same name as thought of at first": same,
            "interval": interval(same, len(tasks)),
        }), flush=True)  # fmt: skip


async def run_all(tasks: list, folder: Path, config: AgentConfig, model: str) -> list:
    """Run the tasks with one engine."""
    front = open_model(model, None, None, EngineOptions())
    try:
        return await run_tasks(tasks, front.backend, front.encoding, folder, config, at_once=8)
    finally:
        await front.backend.close()


def is_same(journal: Path) -> bool:
    """Return whether the name of the last command is the one of the first thought that has one."""
    thought, written = None, None
    for event in read_events(journal):
        if event["kind"] != "reply":
            continue
        message = event["message"]
        found = re.search(r"I keep (\S+) in mind", message["reasoning"] or "")
        if thought is None and found and found.group(1) != "it":
            thought = found.group(1)
        for call in message["calls"]:
            command = re.search(r"echo (\S+) > ", call[2])
            written = command.group(1) if command else written
    return thought is not None and thought == written


if __name__ == "__main__":
    main()

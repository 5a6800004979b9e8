"""`hadal eval`: an agent on many tasks, each in a box of its own."""

import asyncio
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hadal.cli.agent_options import keeps_logprobs
from hadal.cli.run import open_model
from hadal.cli.run_settings import model_identity
from hadal.cli.serve import EngineOptions, ServedOptions
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.agent import AgentConfig
    from hadal.evals import TaskResult
    from hadal.serve import Front
    from hadal.tasks import Task

__all__ = ["evaluate", "score_table"]

_Flag = Parameter(negative="")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks.

    Attributes:
        family: Families of tasks; can be repeated. Default: all.
        task: Exactly these, as FAMILY/SPLIT/SEED; can be repeated.
        split: Whether those that could be trained on, or those that no training has seen.
        count: Tasks of each family.
        first_seed: Of the first of them.
    """

    family: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    task: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    split: Literal["train", "test"] = "test"
    count: int = 5
    first_seed: int = 0

    def tasks(self) -> list["Task"]:
        """Return them.

        Raises:
            ConfigError: There is no such family.
        """
        from hadal.tasks import FAMILIES, UNSEEN, make_task, named_task

        if self.task:
            return [named_task(name) for name in self.task]
        families = self.family or (*FAMILIES, *(UNSEEN if self.split == "test" else ()))
        seeds = range(self.first_seed, self.first_seed + self.count)
        return [make_task(f, self.split, seed) for seed in seeds for f in families]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TurnOptions:
    """What the agent may do.

    Attributes:
        temperature: 0 for the most probable token.
        max_turns: Replies of the model, at most.
        max_reply: Tokens of a reply, at most.
        window: Tokens of prompt and reply together, at most.
        hold_calls: Hold its calls to their grammar, so that none can be malformed; checkpoints only.
        drop_reasoning: Take the reasoning of earlier user turns away, to see what it is good for.
        logprobs: Keep the log-probability of every token that it says, for trainers. Default: where the model is a
            checkpoint.
    """

    temperature: float = 0.0
    max_turns: int = 24
    max_reply: int = 512
    window: int = 32 * 1024
    hold_calls: Annotated[bool, _Flag] = False
    drop_reasoning: Annotated[bool, _Flag] = False
    logprobs: bool | None = None

    def config(self, model: str) -> "AgentConfig":
        """Return settings of the agent."""
        from hadal.agent import AgentConfig, Limits

        scored = {"logprobs": 0} if keeps_logprobs(self.logprobs, model) else {}
        return AgentConfig(
            sampling={"temperature": self.temperature, **scored},
            limits=Limits(turns=self.max_turns, reply=self.max_reply, window=self.window),
            hold_calls=self.hold_calls, keep_reasoning=not self.drop_reasoning,
        )  # fmt: skip


def evaluate(
    *,
    model: str = "nano",
    tokenizer: Path | None = None,
    generation: Literal["v4", "v4-0731", "v4.1"] | None = None,
    into: Path | None = None,
    at_once: int = 8,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
    tasks: TaskOptions | None = None,
    turns: TurnOptions | None = None,
    engine: EngineOptions | None = None,
    served: ServedOptions | None = None,
) -> None:
    """Let an agent do tasks, look into the boxes, and say what share it solved.

    Every task has a box of its own and a check that looks at what is in it, not at what was said. The same
    command with the same folder goes on where it was. Exit codes: 0 all tasks have an outcome, 2 wrong usage, 3
    some have none, because our machinery failed.

    Examples:
        hadal eval --count 2

        hadal eval --family set_key --family fix_name --count 20 --into results

        hadal eval --model http://gpu-box:8000 --tokenizer path/to/checkpoint --json

    Args:
        model: A checkpoint's folder, or the URL of a server with a completions endpoint, whose key is read from
            HADAL_UPSTREAM_KEY. Default: the small network that comes with hadal.
        tokenizer: Folder or tokenizer.json, where the model is a URL.
        generation: Of the message format. Default: read from the checkpoint.
        into: Folder of the runs. Default: a new one.
        at_once: Tasks at a time.
        json_output: Print each result as a line of JSON.
        tasks: Which tasks.
        turns: What the agent may do.
        engine: How the model runs.
        served: How such a server is asked.
    """
    from hadal.evals import keep_settings

    if at_once < 1:
        raise ConfigError(f"--at-once: expected a positive number, got {at_once}")
    asked = (tasks or TaskOptions()).tasks()
    folder = into or Path(tempfile.mkdtemp(prefix="hadal-eval-"))
    console = Console(stderr=True, highlight=False)
    name = "" if served is None or served.upstream_model is None else f" {served.upstream_model}"
    identity = f"{model_identity(model)}{name}"
    keep_settings(folder, {"model": identity, "turns": asdict(turns or TurnOptions())})
    front = open_model(model, tokenizer, generation, engine or EngineOptions(), served)
    config = (turns or TurnOptions()).config(model)
    results = asyncio.run(_run(front, asked, folder, config, at_once, console, json_output))
    if not json_output:
        score_table(Console(highlight=False), results)
    console.print(f"runs: {folder} (hadal view {folder})", markup=False, soft_wrap=True)
    sys.exit(3 if any(r.outcome == "void" for r in results) else 0)


async def _run(
    front: "Front", tasks: list["Task"], folder: Path, config: "AgentConfig", at_once: int,
    console: Console, json_output: bool,
) -> list["TaskResult"]:  # fmt: skip
    from hadal.evals import run_tasks

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    solved = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("tasks", total=len(tasks))

        def progress(result: "TaskResult") -> None:
            nonlocal solved
            solved += result.solved
            bar.update(shown, advance=1, description=f"solved {solved}")
            if json_output:
                print(json.dumps(asdict(result)), flush=True)  # noqa: T201 - data goes to stdout

        try:
            return await run_tasks(
                tasks, front.backend, front.encoding, folder, config, at_once=at_once,
                progress=progress,
            )  # fmt: skip
        finally:
            await front.backend.close()


def score_table(console: Console, results: list["TaskResult"]) -> None:
    """Print what share of every family was solved."""
    from hadal.evals import Score, scores, well_formed
    from hadal.tasks import UNSEEN

    table = Table("level", "family", "solved", "95 %", box=None)
    for (level, family), score in scores(results).items():
        name = f"{family} (not trained on)" if family in UNSEEN else family
        void = f", {score.void} void" if score.void else ""
        low, high = score.interval
        of = f"{score.solved} of {score.count}{void}"
        table.add_row(str(level), name, of, f"{low:.0%} to {high:.0%}")
    console.print(table)
    for title, chosen in (
        ("solved", [r for r in results if r.family not in UNSEEN]),
        ("solved of families not trained on", [r for r in results if r.family in UNSEEN]),
    ):
        score = Score.of(chosen)
        if score.count:
            console.print(f"{title}: {score.solved} of {score.count}, {score}")
    good, calls = well_formed(results)
    if calls:
        console.print(f"calls: {calls}, well-formed {good / calls:.2%}")
    replies, bad = sum(r.turns for r in results), sum(r.bad_replies for r in results)
    console.print(f"replies: {replies}, of which {bad} led to nothing")

"""One task: a box, an agent in it, and a look at the box afterwards."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.agent import Agent, AgentConfig, Journal, Outcome, StopReason, read_events
from hadal.agent.atif import to_atif
from hadal.agent.boxed import note_box, open_box
from hadal.agent.trajectory import last_score
from hadal.backends import Backend
from hadal.chat import Termination, Tool, ToolCall
from hadal.encoding import Encoding, check_call
from hadal.errors import ConfigError, SandboxError, SandboxGoneError, StorageError
from hadal.sandbox import AsyncSandbox
from hadal.tasks import Task, check, prepare
from hadal.tools import BashTool, EditorTool, FileWatch, Toolbox

__all__ = [
    "TaskResult",
    "journal_path",
    "keep_settings",
    "read_result",
    "run_task",
    "run_tasks",
]

_COMMAND_S = 20.0
"""Of a command: these tasks take milliseconds, and a program that waits for a person waits for ever."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What came of a task.

    Attributes:
        task: Its name.
        family, level: Of it.
        outcome: Scored, failed by the agent, or void.
        score: 1 if it was solved, else 0; None where nothing can be said.
        reason: Why the agent stopped.
        detail: What the check found, or what went wrong.
        turns: Replies of the model.
        calls, malformed_calls: Calls that it tried to make, and those of them that were not right in form or
            did not fit a tool that is there.
        bad_replies: Replies that could not be used.
        prompt_tokens, cached_tokens, reply_tokens: In all turns.
        seconds: From the first event to the last.
    """

    task: str
    family: str
    level: int
    outcome: Outcome
    score: int | None
    reason: StopReason
    detail: str
    turns: int
    calls: int
    malformed_calls: int
    bad_replies: int
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    seconds: float

    @property
    def solved(self) -> bool:
        """Return whether it was solved."""
        return self.score == 1


async def run_task(
    task: Task, backend: Backend, encoding: Encoding, path: Path, config: AgentConfig | None = None,
    *, watch: Callable[[dict[str, Any]], None] = lambda _: None,
) -> TaskResult:  # fmt: skip
    """Let an agent do a task, and check it; where the journal has begun it, it goes on.

    Args:
        task: The task.
        backend: Makes the replies.
        encoding: The format, with the tokenizer.
        path: Of the journal.
        config: Settings of the agent.
        watch: Told every event.

    Raises:
        StorageError: The journal cannot be written.
        ConfigError: Another process runs it.
    """
    with Journal(path) as journal:
        scored = any(e["kind"] == "score" and e["score"] is not None for e in journal.events)
        if scored:
            await _end_box(journal)  # unless that is done
        else:  # or void: what failed was ours, and may work now
            try:
                await _work(task, backend, encoding, journal, config, watch)
            except SandboxError as error:  # outside of the loop: making the box, or looking at it
                journal.append("score", score=None, detail=str(error))
    return read_result(task, path)


async def _work(
    task: Task, backend: Backend, encoding: Encoding, journal: Journal, config: AgentConfig | None,
    watch: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    box, is_new = await open_box(journal, task.spec)
    async with box:
        if is_new:
            await prepare(task, box)
            note_box(journal, box, watch, task=task.name)
        toolbox = Toolbox([BashTool(box, timeout_s=_COMMAND_S), EditorTool(box)], FileWatch(box))
        agent = Agent(backend, encoding, toolbox, journal, config, watch=watch)
        ending = await agent.run(task.messages)
        if ending.outcome is Outcome.VOID:  # the box stays, for who goes on
            watch(journal.append("score", score=None, detail=ending.text))
            return
        found = await check(task, box)
        watch(journal.append("score", score=int(found.solved), detail=found.reason))
        await box.kill()
        journal.append("box_ended")


async def _end_box(journal: Journal) -> None:
    """End the box of a task that was scored by a process that died before it could do that."""
    if any(e["kind"] == "box_ended" for e in journal.events):
        return
    known = next(e["id"] for e in journal.events if e["kind"] == "box")
    with suppress(SandboxGoneError):
        async with await AsyncSandbox.connect(known) as box:
            await box.kill()
    journal.append("box_ended")


def journal_path(folder: Path, task: Task) -> Path:
    """Return where the journal of a task is, in a folder of runs."""
    return folder / f"{task.name.replace('/', '-')}.jsonl"


def read_result(task: Task, path: Path) -> TaskResult:
    """Return what came of a task, as its journal says.

    Raises:
        StorageError: It cannot be read, or the task is not over.
    """
    events = read_events(path)
    score = last_score(events)
    if score is None:
        raise StorageError(f"{path} has no outcome yet", hint="the task has to be run to its end")
    ending = next((e for e in reversed(events) if e["kind"] == "end"), None)
    reason = StopReason(ending["reason"]) if ending else StopReason.SANDBOX_FAILED
    outcome = Outcome.SCORED if reason is StopReason.DONE else Outcome.FAILED
    if score["score"] is None:
        outcome = Outcome.VOID
    replies = [e for e in events if e["kind"] == "reply"]
    calls, malformed = _count_calls(events)
    totals = to_atif(events, task.name, token_ids=False)["final_metrics"]
    return TaskResult(
        task=task.name, family=task.family, level=task.level, outcome=outcome, score=score["score"],
        reason=reason, detail=score["detail"], turns=len(replies),
        calls=calls, malformed_calls=malformed,
        bad_replies=sum(e["bad"] is not None for e in replies),
        prompt_tokens=totals["total_prompt_tokens"], cached_tokens=totals["total_cached_tokens"],
        reply_tokens=totals["total_completion_tokens"],
        seconds=(score["at"] - events[0]["at"]) / 1e9,
    )  # fmt: skip


def _count_calls(events: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many calls were tried, and how many of them were malformed."""
    tools = [Tool(f) for e in events if e["kind"] == "start" for f in e["tools"]]
    tried = malformed = 0
    for event in events:
        if event["kind"] != "reply":
            continue
        calls = [
            ToolCall(name, arguments, id=i) for i, name, arguments in event["message"]["calls"]
        ]
        broken = event["termination"] in (Termination.MALFORMED, Termination.LENGTH_IN_CALL)
        here = len(calls) + broken
        tried += here
        unfit = sum(check_call(call, tools) is not None for call in calls)
        # What is wrong with a reply that makes no call is no wrong call.
        malformed += min(here, max(unfit + broken, bool(event["problems"])))
    return tried, malformed


async def run_tasks(
    tasks: Sequence[Task], backend: Backend, encoding: Encoding, folder: Path,
    config: AgentConfig | None = None, *, at_once: int = 4,
    progress: Callable[[TaskResult], None] = lambda _: None,
) -> list[TaskResult]:  # fmt: skip
    """Run many tasks, several at a time; those that are done already are read from their journals.

    Raises:
        StorageError, ConfigError: As `run_task`.
    """
    limit = asyncio.Semaphore(at_once)

    async def one(task: Task) -> TaskResult:
        async with limit:
            path = journal_path(folder, task)
            result = await run_task(task, backend, encoding, path, config)
        progress(result)
        return result

    return list(await asyncio.gather(*map(one, tasks)))


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down how the runs of a folder are made, so that no other ones come among them.

    Raises:
        ConfigError: They were begun otherwise.
        StorageError: It cannot be written or read.
    """
    path, made = folder / "settings.json", folder / f".settings.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps(settings))
        try:
            path.hardlink_to(made)  # whole, and once, whoever else does the same
        except FileExistsError:
            pass
        finally:
            made.unlink()
        begun: Any = json.loads(path.read_text())
        other = [name for name, value in settings.items() if begun[name] != value]
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"cannot use {path}: {type(error).__name__}: {error}") from error
    if other:
        raise ConfigError(
            f"the runs in {folder} were begun with another {', another '.join(other)}",
            hint="go on with the same, or name another folder",
        )

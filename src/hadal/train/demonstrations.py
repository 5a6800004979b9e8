"""Demonstrations of many tasks: done in boxes, kept in a file, read as conversations."""

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.chat import AssistantMessage, Message, ToolCall, ToolMessage, UserMessage
from hadal.errors import HadalError, StorageError
from hadal.sandbox import AsyncSandbox
from hadal.tasks import Split, demonstrate, make_task

__all__ = ["Recorded", "collect", "read"]


@dataclass(frozen=True)
class Recorded:
    """A demonstration as it was kept."""

    family: str
    seed: int
    messages: tuple[Message, ...]


async def collect(
    tasks: Sequence[tuple[str, int]], path: Path, *, split: Split = "train", at_once: int = 6,
    progress: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
    """Do tasks in boxes of their own and write what was said to a file, in the order of the tasks.

    Args:
        tasks: Families and seeds.
        path: A gzip file of JSON lines; it is there when all of it is.
        split: Of the tasks.
        at_once: Boxes.
        progress: Told how many are done.

    Raises:
        HadalError: A box failed, or a solution does not solve its task.
    """
    limit = asyncio.Semaphore(at_once)
    done = 0

    async def one(family: str, seed: int) -> str:
        nonlocal done
        task = make_task(family, split, seed)
        async with limit, await AsyncSandbox.create(task.spec) as box:
            shown = await demonstrate(task, box)
        if not shown.outcome.solved:
            raise HadalError(
                f"the solution of {task.name} does not solve it: {shown.outcome.reason}"
            )
        done += 1
        progress(done)
        return json.dumps(
            {"family": family, "seed": seed, "messages": [_written(m) for m in shown.messages]}
        )

    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        for at in range(0, len(tasks), 512):
            async with asyncio.TaskGroup() as group:
                made = [group.create_task(one(*task)) for task in tasks[at : at + 512]]
            file.writelines(f"{m.result()}\n" for m in made)
    partial.rename(path)


def read(path: Path) -> Iterator[Recorded]:
    """Yield the demonstrations of a file.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                messages = tuple(_read_message(m) for m in fields["messages"])
                yield Recorded(fields["family"], fields["seed"], messages)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise StorageError(f"cannot read demonstrations from {path}: {error}") from error


def _written(message: Message) -> dict[str, Any]:
    match message:
        case UserMessage():
            return {"user": message.content}
        case ToolMessage():
            return {"result": message.content}
        case AssistantMessage():
            calls = [[call.name, call.arguments] for call in message.tool_calls]
            return {"thought": message.reasoning_content, "text": message.content, "calls": calls}
        case _:
            raise AssertionError(message)


def _read_message(fields: dict[str, Any]) -> Message:
    if "user" in fields:
        return UserMessage(fields["user"])
    if "result" in fields:
        return ToolMessage(fields["result"], "call-0")
    calls = tuple(
        ToolCall(name, arguments, id=f"call-{at}")
        for at, (name, arguments) in enumerate(fields["calls"])
    )
    return AssistantMessage(fields["text"], reasoning_content=fields["thought"], tool_calls=calls)

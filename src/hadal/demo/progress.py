"""What the tasks of a demonstration are doing, read from their journals while others write them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.agent import read_events
from hadal.evals import journal_path
from hadal.plain_text import one_line
from hadal.tasks import Task

__all__ = ["Progress", "TaskState"]

_SHOWN = 70
"""Characters of a command or thought."""


@dataclass
class TaskState:
    """How far a task is.

    Attributes:
        turns: Replies that are whole.
        results: Calls that have come back.
        pending: Tokens of the reply that is being written.
        doing: In words.
        score: Once it is known.
        over: Whether there is an outcome, be it void.
    """

    turns: int = 0
    results: int = 0
    pending: int = 0
    doing: str = "waiting"
    score: int | None = None
    over: bool = False

    def take(self, event: dict[str, Any]) -> None:
        """Take an event in."""
        match event["kind"]:
            case "box":
                self.doing = "has a box"
            case "user":
                self.doing = f"asked: {event['text']}"
            case "prompt":
                self.pending, self.doing = 0, "reading"
            case "tokens":
                self.pending += len(event["ids"])
                self.doing = f"thinking, {self.pending} tokens"
            case "reply":
                self._take_reply(event["message"])
            case "result":
                self.results += 1
            case "end":
                self.doing = f"ended: {event['reason']}"
            case "score":
                self.score, self.over = event["score"], True
                words = {1: "solved", 0: "not solved: ", None: "void: "}[self.score]
                self.doing = words + event["detail"]
            case _:
                pass

    def _take_reply(self, message: dict[str, Any]) -> None:
        self.turns += 1
        self.pending = 0
        for _, _, arguments in message["calls"]:
            self.doing = f"$ {_command(arguments)}"

    @property
    def shown(self) -> str:
        """Return what it does, in one short line."""
        return one_line(" ".join(self.doing.split()), _SHOWN)


def _command(arguments: str) -> str:
    try:
        fields: dict[str, Any] = json.loads(arguments)
    except ValueError:
        return arguments
    return " ".join(str(fields.get(name, "")) for name in ("command", "path"))


class Progress:
    """The states of all tasks; journals are read again when they have grown."""

    def __init__(self, tasks: Iterable[Task], folder: Path) -> None:
        self.states = {task.name: TaskState() for task in tasks}
        self._paths = {task.name: journal_path(folder, task) for task in tasks}
        self._sizes = dict.fromkeys(self.states, 0)

    def update(self) -> list[str]:
        """Look again, and return the names of the tasks that have come to an end since."""
        ended: list[str] = []
        for name, path in self._paths.items():
            size = path.stat().st_size if path.exists() else 0
            if size == self._sizes[name]:
                continue
            self._sizes[name] = size
            state = TaskState()
            for event in read_events(path):
                state.take(event)
            if state.over and not self.states[name].over:
                ended.append(name)
            self.states[name] = state
        return ended

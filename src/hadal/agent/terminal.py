"""A run as it happens, for people at a terminal."""

import time
from typing import Any, Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from hadal.agent.stop import StopReason
from hadal.plain_text import one_line, visible

__all__ = ["Terminal", "show_event"]

_LINES = 12
"""Of a result."""
_TAIL = 60
"""Characters of what is being written."""


class Terminal:
    """Shows the events of a run; below them, where the console is a terminal, one line on what is under way.

    Args:
        console: Where to.

    Attributes:
        status: What is under way.
    """

    def __init__(self, console: Console) -> None:
        self.status = ""
        self._console = console
        self._line = Status("", console=console) if console.is_terminal else None
        self._tokens, self._tail, self._began = 0, "", 0.0
        self._commands: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._line is not None:
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the line away."""
        if self._line is not None:
            self._line.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show an event."""
        show_event(self._console, event)
        self.status = self._take(event)
        if self._line is not None:
            self._line.update(Text(self.status, style="dim"))

    def _take(self, event: dict[str, Any]) -> str:
        """Take an event in, and return what is under way."""
        match event["kind"]:
            case "prompt":
                self._tokens, self._tail, self._began = 0, "", time.monotonic()
                return f"reads {len(event['ids']):,} tokens"
            case "tokens":
                self._tokens += len(event["ids"])
                self._tail = (self._tail + event["text"])[-_TAIL:]
                took = time.monotonic() - self._began
                return f"writes, {self._tokens:,} tokens, {took:.0f} s: {_last_line(self._tail)}"
            case "call":
                self._commands[event["call"]] = event["name"]
            case "output":
                self._tail = (self._tail + event["text"])[-_TAIL:]
            case "result":
                self._commands.pop(event["call"], None)
                self._tail = ""
            case "reply":
                self._tail = ""
            case _:
                pass
        if not self._commands:
            return ""
        return f"runs {one_line(', '.join(self._commands.values()))}: {_last_line(self._tail)}"


def show_event(console: Console, event: dict[str, Any]) -> None:
    """Print what an event says, if it says something to people."""
    match event["kind"]:
        case "user":
            by = "user" if event.get("by", "user") == "user" else "harness"
            console.print(_text(f"{by}: {event['text']}", "bold"))
        case "reply":
            _show_reply(console, event)
        case "result":
            style = "red" if event["failed"] else "green"
            console.print(_text(_short(event["text"]), "dim"))
            code = "" if event["exit_code"] is None else f"exit code {event['exit_code']}, "
            console.print(Text(f"  [{code}{event['seconds']:.2f} s]", style=style))
        case "retry":
            again = f"asked again after {event['after_s']:g} s"
            console.print(_text(f"{event['error']}; {again}", "yellow"))
        case "end":
            why = (
                "" if event["reason"] == StopReason.DONE else f": {event['text']}"
            )  # else the answer
            console.print(_text(f"ended: {event['reason']}{why}", "bold"))
        case _:
            pass


def _show_reply(console: Console, event: dict[str, Any]) -> None:
    message = event["message"]
    if message["reasoning"]:
        console.print(_text(message["reasoning"], "italic dim"))
    if message["content"]:
        console.print(_text(message["content"]))
    for _, name, arguments in message["calls"]:
        console.print(_text(f"{name} {arguments}", "cyan"))
    for problem in event["problems"]:
        console.print(_text(f"  {problem}", "yellow"))


def _text(text: str, style: str = "") -> Text:
    """Return what a model or a box says: it is shown, and neither steers the terminal nor is markup of ours."""
    return Text(visible(text), style=style)


def _short(text: str) -> str:
    lines = text.rstrip("\n").splitlines()
    if len(lines) <= _LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:_LINES], f"... {len(lines) - _LINES} more lines"])


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return one_line(lines[-1], _TAIL) if lines else ""

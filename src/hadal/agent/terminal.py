"""A run as it happens, for people at a terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["show_event"]

_LINES = 12
"""Of a result."""


def show_event(console: Console, event: dict[str, Any]) -> None:
    """Print what an event says, if it says something to people."""
    match event["kind"]:
        case "user":
            by = "user" if event.get("by", "user") == "user" else "harness"
            console.print(Text(f"{by}: {event['text']}", style="bold"))
        case "reply":
            _show_reply(console, event)
        case "result":
            style = "red" if event["failed"] else "green"
            console.print(Text(_short(event["text"]), style="dim"))
            code = "" if event["exit_code"] is None else f"exit code {event['exit_code']}, "
            console.print(Text(f"  [{code}{event['seconds']:.2f} s]", style=style))
        case "retry":
            again = f"asked again after {event['after_s']:g} s"
            console.print(Text(f"{event['error']}; {again}", style="yellow"))
        case "end":
            console.print(Text(f"ended: {event['reason']}", style="bold"))
        case _:
            pass


def _show_reply(console: Console, event: dict[str, Any]) -> None:
    message = event["message"]
    if message["reasoning"]:
        console.print(Text(message["reasoning"], style="italic dim"))
    if message["content"]:
        console.print(Text(message["content"]))
    for _, name, arguments in message["calls"]:
        console.print(Text(f"{name} {arguments}", style="cyan"))
    for problem in event["problems"]:
        console.print(Text(f"  {problem}", style="yellow"))


def _short(text: str) -> str:
    lines = text.rstrip("\n").splitlines()
    if len(lines) <= _LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:_LINES], f"... {len(lines) - _LINES} more lines"])

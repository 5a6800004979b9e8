"""A conversation in a terminal: reasoning and calls visible, streamed."""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from rich.console import Console
from rich.text import Text

from hadal.backends.backend import Prefill
from hadal.chat import Conversation, Message, SystemMessage, ToolMessage, UserMessage
from hadal.chat.messages import Mode, Tool
from hadal.encoding.deltas import (
    ArgumentsDelta,
    CallFailed,
    CallStart,
    ContentDelta,
    ReasoningDelta,
)
from hadal.errors import HadalError
from hadal.plain_text import one_line, visible
from hadal.serve.http import new_id
from hadal.serve.turn import Finished, Front, Said

__all__ = ["chat"]

_STYLES = {ReasoningDelta: "dim italic", ContentDelta: "", CallStart: "yellow"}


async def chat(
    front: Front,
    console: Console,
    ask: Callable[[str], str],
    *,
    system: str | None = None,
    tools: Sequence[Tool] = (),
    mode: Mode | None = None,
    effort: str | None = None,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Talk until the user ends the input. Calls are shown, and the user types their results.

    Args:
        front: What answers.
        console: Where it is shown.
        ask: Reads a line after a prompt, in this thread, as there is nothing else to do meanwhile; raises
            EOFError at the end.
        system: First message.
        tools: Declared tools.
        mode: thinking or chat.
        effort: How hard to think.
        sampling: Fields of `SamplingParams`.
    """
    messages: list[Message] = [SystemMessage(system)] if system else []
    while True:
        try:
            line = ask("you> ")
        except EOFError:
            return
        if not line.strip():
            continue
        before = len(messages)
        messages.append(UserMessage(line))
        conversation = Conversation(tuple(messages), tuple(tools), mode=mode, effort=effort)
        try:
            await _answer(front, console, ask, conversation, messages, sampling or {})
        except HadalError as err:
            _print_line(console, f"error: {err}", "red")
            del messages[before:]  # with them, calls that now have no results
        except EOFError:
            return


async def _answer(
    front: Front,
    console: Console,
    ask: Callable[[str], str],
    conversation: Conversation,
    messages: list[Message],
    sampling: dict[str, Any],
) -> None:
    """Show turns of the model until one calls nothing."""
    while True:
        current = Conversation(
            tuple(messages), conversation.tools, mode=conversation.mode, effort=conversation.effort
        )
        finished = await _show(front, console, current, sampling)
        messages.append(finished.message)
        if not finished.message.tool_calls:
            return
        for call in finished.message.tool_calls:
            result = ask(f"result of {one_line(call.name)}> ")
            messages.append(ToolMessage(result, tool_call_id=call.id))


async def _show(
    front: Front, console: Console, conversation: Conversation, sampling: dict[str, Any]
) -> Finished:
    await front.backend.ready()  # what fits is judged before it is asked for
    turn = front.open(conversation)
    finished: Finished | None = None
    async with aclosing(front.run(turn, sampling, response_id=new_id("chat-"))) as pieces:
        async for piece in pieces:
            if isinstance(piece, Prefill) and console.is_terminal:
                console.print(f"reading {piece.done}/{piece.total}", style="dim", end="\r")
            elif isinstance(piece, Said):
                for delta in piece.deltas:
                    _print(console, delta)
            elif isinstance(piece, Finished):
                finished = piece
    assert finished is not None
    usage = finished.usage
    console.print()
    cached = "" if usage.cached is None else f", {usage.cached} of them cached"
    _print_line(
        console,
        f"[{usage.prompt} tokens in{cached}; {usage.completion} out, {usage.reasoning} of them "
        f"reasoning; {finished.finish_reason}]",
        "dim",
    )
    return finished


def _print_line(console: Console, text: str, style: str) -> None:
    """Show a line of ours, which may quote another server."""
    console.print(Text(visible(text), style=style))


def _print(console: Console, delta: object) -> None:
    """Show a delta. What the model writes is text: no markup of ours, no control characters."""
    if isinstance(delta, ReasoningDelta | ContentDelta | ArgumentsDelta):
        style = "yellow" if isinstance(delta, ArgumentsDelta) else _STYLES[type(delta)]
        console.print(Text(visible(delta.text), style=style), end="")
    elif isinstance(delta, CallStart):
        console.print(Text(f"\n{one_line(delta.name)} ", style="bold yellow"), end="")
    elif isinstance(delta, CallFailed):
        _print_line(console, f"\nmalformed call: {delta.problem.reason}", "red")

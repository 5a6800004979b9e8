"""What a request says about how to answer: thinking or not, how hard, and which tools.

The three APIs spell these differently and mean the same, so the decisions stand here once.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from hadal.chat.messages import Mode, NamedToolChoice, Tool, ToolChoice
from hadal.chat.wire import Reading, WireModel, read_text
from hadal.errors import InvalidConversationError

__all__ = [
    "check_tool_choice",
    "decide_mode",
    "read_thinking",
    "read_tool_choice",
    "written_thinking",
]


class _Thinking(WireModel):
    """The `thinking` object of DeepSeek's and Anthropic's APIs."""

    type: Literal["enabled", "disabled", "adaptive"] | None = None
    budget_tokens: int | None = None
    display: str | None = None


def decide_mode(
    switches: Iterable[bool | None], efforts: Mapping[str, Any]
) -> tuple[Mode | None, str | None]:
    """Mode and effort of a request from every field that speaks of them.

    One "off" wins over anything else, effort included: agents send both, and hosted services
    that refuse the pair break them. The effort "none" is an "off" too. Any other effort is kept
    as it is spelt and does not decide the mode: the caller's default does.

    Args:
        switches: True for on, False for off, None for a field that says nothing.
        efforts: Path of each effort field to its value.

    Raises:
        InvalidConversationError: An effort of a wrong type, or two that differ.
    """
    given: dict[str, str] = {}
    for path, value in efforts.items():
        if isinstance(value, int) and not isinstance(value, bool):
            given[path] = str(value)  # V4.1 counts from 1 to 100
        elif value is not None:
            given[path] = read_text(value, path)
    if len(set(given.values())) > 1:
        raise InvalidConversationError(
            f"the efforts in {', '.join(given)} differ", where=next(iter(given))
        )
    effort = next(iter(given.values()), None)
    said = [s for s in switches if s is not None]
    if effort == "none":
        return "chat", None
    if not said:
        return None, effort
    return ("thinking" if all(said) else "chat"), effort


def read_thinking(reading: Reading, value: Any, path: str) -> tuple[bool | None, dict[str, Any]]:
    """Read a `thinking` object: whether it is on, and what else it says, for the options."""
    if value is None:
        return None, {}
    found = reading.check(_Thinking, value, path)
    reading.note_extra(found, path)
    rest = found.model_dump(exclude_none=True, exclude=set(found.__pydantic_extra__ or {}))
    if found.type in ("enabled", "disabled"):
        del rest["type"]  # the mode says it; "adaptive" stays, as no mode does
    return (None if found.type is None else found.type != "disabled"), rest


def read_tool_choice(value: Any, read_name: Callable[[], str]) -> ToolChoice:
    """Read the words that both OpenAI shapes share; `read_name` reads a named tool.

    Raises:
        InvalidConversationError: Another word.
    """
    if value is None:
        return "auto"
    if not isinstance(value, str):
        return NamedToolChoice(read_name())
    if value in ("auto", "none", "required"):
        return value
    raise InvalidConversationError(
        "expected 'auto', 'none', 'required' or a function", where="tool_choice"
    )


def check_tool_choice(choice: ToolChoice, tools: Iterable[Tool], path: str) -> None:
    """Check that a forced call is possible.

    Raises:
        InvalidConversationError: A call is required and the tool, or any tool, is not declared.
    """
    names = {tool.name for tool in tools}
    if isinstance(choice, NamedToolChoice) and choice.name not in names:
        raise InvalidConversationError("names a tool that is not declared", where=path)
    if choice == "required" and not names:
        raise InvalidConversationError("requires a call, but no tool is declared", where=path)


def written_thinking(mode: Mode | None, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the `thinking` object that `read_thinking` takes apart; empty if it says nothing."""
    if mode is None:
        return dict(rest)
    return {"type": "disabled" if mode == "chat" else "enabled", **rest}

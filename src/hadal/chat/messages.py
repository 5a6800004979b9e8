"""What is said: one frozen dataclass per kind of message, and the tools that a model may call.

These are plain values: they do not know tokens, HTTP or a model. Shapes of other people's APIs are
read and written by `openai_chat`, `openai_responses` and `anthropic`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from hadal.chat.outcome import Problem, Termination
from hadal.errors import InvalidConversationError

__all__ = [
    "AssistantMessage",
    "Content",
    "Conversation",
    "DeveloperMessage",
    "ExtractedUrl",
    "ImagePart",
    "Message",
    "Mode",
    "NamedToolChoice",
    "ReminderMessage",
    "SystemMessage",
    "Task",
    "TextPart",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "ToolMessage",
    "UserMessage",
]

Mode = Literal["thinking", "chat"]
"""Whether the model reasons before it answers."""

Task = Literal["action", "query", "authority", "domain", "title", "read_url"]
"""A quick instruction: one token after a message that asks for one short answer."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text within a list of parts; parts are joined by a blank line."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image. Only V4.1 has a place for it; everything else refuses it."""

    url: str


@dataclass(frozen=True, slots=True)
class ExtractedUrl:
    """A link for the `read_url` task, written after its own control token."""

    url: str


Content = str | tuple[TextPart | ImagePart | ExtractedUrl, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call.

    Attributes:
        function: The function object as declared: name, description, parameters (a JSON Schema),
            strict and whatever else; the model sees exactly this JSON, key order included.
    """

    function: Mapping[str, Any]

    def __post_init__(self) -> None:
        name = self.function.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidConversationError(
                f"a tool has no name: expected a non-empty string in function.name, got {name!r}"
            )

    @classmethod
    def of(
        cls, name: str, description: str = "", parameters: Mapping[str, Any] | None = None
    ) -> Self:
        """A tool from its parts, in the order of the published examples."""
        schema = {"type": "object", "properties": {}} if parameters is None else parameters
        return cls({"name": name, "description": description, "parameters": schema})

    @property
    def name(self) -> str:
        """What the model calls it by."""
        return self.function["name"]

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON Schema of the arguments; empty if none was declared."""
        schema = self.function.get("parameters")
        return schema if isinstance(schema, Mapping) else {}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool.

    Attributes:
        name: Name of the tool as the model wrote it.
        arguments: JSON text of an object. From a parser it is valid and keeps the model's number
            spelling; from a client's history it may be anything.
        id: Pairs the call with its result; None if the client gave none.
    """

    name: str
    arguments: str = "{}"
    id: str | None = None

    def parsed(self) -> dict[str, Any]:
        """The arguments as Python values.

        Raises:
            InvalidConversationError: The text is not a JSON object.
        """
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError) as err:
            raise InvalidConversationError(
                f"arguments of the call of {self.name!r} are not JSON: {err}"
            ) from err
        if not isinstance(value, dict):
            raise InvalidConversationError(
                f"arguments of the call of {self.name!r}: expected a JSON object, "
                f"got {type(value).__name__}"
            )
        return value


@dataclass(frozen=True, slots=True)
class SystemMessage:
    """Standing instructions, and the tools if they are declared on a message."""

    content: Content = ""
    tools: tuple[Tool, ...] = ()
    response_format: Mapping[str, Any] | None = None
    role: Literal["system"] = field(default="system", init=False)


@dataclass(frozen=True, slots=True)
class DeveloperMessage:
    """A turn of DeepSeek's search pipeline; it is rendered as a user turn.

    Not the `developer` role of OpenAI's API, which means system.
    """

    content: Content
    tools: tuple[Tool, ...] = ()
    response_format: Mapping[str, Any] | None = None
    task: Task | None = None
    role: Literal["developer"] = field(default="developer", init=False)


@dataclass(frozen=True, slots=True)
class UserMessage:
    """What the user says."""

    content: Content = ""
    task: Task | None = None
    role: Literal["user"] = field(default="user", init=False)


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """What a tool returned.

    Attributes:
        content: The result as text.
        tool_call_id: The call that it answers; results are sorted into the order of their calls.
    """

    content: Content = ""
    tool_call_id: str | None = None
    role: Literal["tool"] = field(default="tool", init=False)


@dataclass(frozen=True, slots=True)
class ReminderMessage:
    """Facts about now (date, place, client) in a slot of their own before the user turn."""

    content: Content = ""
    role: Literal["latest_reminder"] = field(default="latest_reminder", init=False)


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """What the model said.

    Attributes:
        content: The answer.
        reasoning_content: What it thought before; None if that is not known, "" if it was empty.
        tool_calls: Complete, well-formed calls only.
        prefix: The turn is unfinished and generation continues it (chat prefix completion). With
            reasoning and without content, the reasoning is continued.
        task: A quick instruction after this message (`title`).
        termination: How a parsed completion ended; None for a message from a client.
        problems: What was not as the format wants it, with offset, text and what was salvaged.
    """

    content: Content = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    prefix: bool = False
    task: Task | None = None
    termination: Termination | None = None
    problems: tuple[Problem, ...] = ()
    role: Literal["assistant"] = field(default="assistant", init=False)


Message = (
    SystemMessage
    | DeveloperMessage
    | UserMessage
    | ToolMessage
    | ReminderMessage
    | AssistantMessage
)


@dataclass(frozen=True, slots=True)
class NamedToolChoice:
    """The model must call this tool."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedToolChoice


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request to a chat API says, whichever API it was.

    Attributes:
        messages: In order.
        tools: Declared for the whole request.
        tool_choice: What the model may or must do about them.
        response_format: JSON that the answer has to be, or None for text.
        mode: None if the request does not say.
        effort: How hard to think, as the request spells it; None if it does not say.
        options: Every other known field of the request, untouched (sampling, streaming, limits).
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    response_format: Mapping[str, Any] | None = None
    mode: Mode | None = None
    effort: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

"""Messages in OpenAI's Chat Completions shape, read and written.

The roles and keys of the published reference encoder are understood too: its `developer` role is a
turn of the search pipeline, and tools, `task` and `prefix` may sit on a message.

Known fields that are ignored on purpose: `mask` (training only), `index` of a call (streaming
only), `cache_control` (prefix caching is automatic), `name` on a tool result (its call has it),
ids and signatures of reasoning. Known fields that the message format cannot hold (`name`
elsewhere, `annotations`) are left out under the policy `unknown`. Whole requests: `openai_chat`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Strict

from hadal.chat.messages import (
    AssistantMessage,
    Content,
    DeveloperMessage,
    ExtractedUrl,
    ImagePart,
    Message,
    ReminderMessage,
    SystemMessage,
    Task,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.reasoning_fields import read_reasoning
from hadal.chat.wire import (
    Items,
    Reading,
    UnknownPolicy,
    WireModel,
    arguments_text,
    kind_of,
    read_text,
    read_tool,
)
from hadal.errors import InvalidConversationError

__all__ = ["MessageReader", "read_messages", "to_chat_message", "to_chat_tool"]

_ASSISTANT_ONLY: Final[dict[str, str]] = dict.fromkeys(
    "tool_calls function_call reasoning_content reasoning reasoning_details thinking_blocks prefix "
    "wo_eos".split(),
    "only an assistant message has it",
)
_FAULTS: Final = {
    **_ASSISTANT_ONLY,
    "content_blocks": "write `content` as a list of parts",
    "tools": "the published encoder loses it here; put it on a system message",
    "response_format": "the published encoder loses it here; put it on a system message",
    "tool_call_id": "only a tool message has it",
    "task": "only user, developer and assistant messages have it",
}
_ASSISTANT_FAULTS: Final = {
    **{name: hint for name, hint in _FAULTS.items() if name not in _ASSISTANT_ONLY},
    "function_call": "use `tool_calls`",
    "refusal": "put the text into `content`",
    "audio": "only text is supported",
}
_LOSSES: Final = {"name": "speakers cannot be told apart; say who speaks in `content`"}
_ASSISTANT_LOSSES: Final = {**_LOSSES, "annotations": "put what the model should see in `content`"}
_CALL_LOSSES: Final[dict[str, str]] = dict.fromkeys(
    ("provider_specific_fields", "extra_content"), "remove it"
)
_TEXT_ONLY: Final = "only text is supported"
_REFUSED_PARTS: Final[dict[str, str]] = dict.fromkeys(
    "image_url input_image image input_audio audio video_url file refusal".split(), _TEXT_ONLY
)


class _Function(WireModel):
    name: str
    arguments: Any = None
    id: str | None = None


class _Call(WireModel):
    function: _Function
    id: str | None = None
    type: str | None = None
    index: int | None = None


class _User(WireModel):
    role: str
    content: Any = None
    mask: Any = None
    cache_control: Any = None
    task: Task | None = None


class _Reminder(WireModel):
    role: str
    content: Any = None
    mask: Any = None
    cache_control: Any = None


class _Tool(_Reminder):
    tool_call_id: str | None = None
    name: str | None = None


class _System(_Reminder):
    tools: Items | None = None
    response_format: dict[str, Any] | None = None


class _Developer(_System):
    task: Task | None = None


class _Assistant(_User):
    tool_calls: Annotated[list[_Call], Strict(False)] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: Items | None = None
    thinking_blocks: Items | None = None
    provider_specific_fields: dict[str, Any] | None = None
    prefix: bool | None = None
    wo_eos: bool | None = None


class _TextPart(WireModel):
    type: str
    text: str
    cache_control: Any = None


class _Url(WireModel):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class _ImagePart(WireModel):
    type: str
    image_url: _Url


class _ExtractedUrlPart(WireModel):
    type: str
    url: str


class _DeclaredTool(WireModel):
    function: dict[str, Any]
    type: str | None = None
    cache_control: Any = None


_PARTS: Final[dict[str, type[WireModel]]] = {"text": _TextPart, "extracted_url": _ExtractedUrlPart}


def read_messages(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    unknown: UnknownPolicy = "error",
    images: bool = False,
) -> list[Message]:
    """Read OpenAI-shaped messages, with the extra keys and roles of the reference encoder.

    Args:
        messages: Dicts; dataclasses pass through.
        unknown: Whether a field that would be left out is an error or a logged warning.
        images: Keep images as `ImagePart`, instead of refusing them.

    Raises:
        InvalidConversationError: One or more messages do not have the shape; all are listed, and
            `where` is the path of the first.
    """
    if isinstance(messages, Mapping | str | bytes):
        raise InvalidConversationError(f"expected a list of messages, got {kind_of(messages)}")
    reader = MessageReader(Reading(unknown, images=images))
    reading = reader.reading
    return reading.settle(lambda: list(reading.each(messages, "messages", reader.read)))


class MessageReader:
    """Reads messages one by one; what is wrong gathers in `reading`."""

    def __init__(
        self, reading: Reading, *, developer: Literal["developer", "system"] = "developer"
    ) -> None:
        self.reading = reading
        self._readers: dict[str, Callable[[Mapping[str, Any], str], Message]] = {
            "system": self._system,
            "developer": self._developer if developer == "developer" else self._system,
            "user": self._user,
            "assistant": self._assistant,
            "tool": self._tool,
            "latest_reminder": self._reminder,
        }

    def read(self, raw: Any, path: str) -> Message:
        """Read one message."""
        if isinstance(raw, get_args(Message)):
            return raw
        if not isinstance(raw, Mapping):
            raise InvalidConversationError(f"expected an object, got {kind_of(raw)}", where=path)
        role = raw.get("role")
        read = self._readers.get(role) if isinstance(role, str) else None
        if read is None:
            raise InvalidConversationError(
                f"unknown role: expected one of {', '.join(self._readers)}",
                where=f"{path}.role",
                hint="give the result as role 'tool'" if role == "function" else None,
            )
        return read(raw, path)

    def _user(self, raw: Mapping[str, Any], path: str) -> Message:
        found = self.reading.check(_User, raw, path)
        self._note_extra(found, path)
        return UserMessage(self._content(found.content, path), found.task)

    def _tool(self, raw: Mapping[str, Any], path: str) -> Message:
        found = self.reading.check(_Tool, raw, path)
        self._note_extra(found, path)
        return ToolMessage(self._content(found.content, path), found.tool_call_id)

    def _reminder(self, raw: Mapping[str, Any], path: str) -> Message:
        found = self.reading.check(_Reminder, raw, path)
        self._note_extra(found, path)
        return ReminderMessage(self._content(found.content, path))

    def _system(self, raw: Mapping[str, Any], path: str) -> Message:
        found = self.reading.check(_System, raw, path)
        self._note_extra(found, path)
        tools = self.tools(found.tools, path)
        return SystemMessage(self._content(found.content, path), tools, found.response_format)

    def _developer(self, raw: Mapping[str, Any], path: str) -> Message:
        found = self.reading.check(_Developer, raw, path)
        self._note_extra(found, path)
        content, tools = self._content(found.content, path), self.tools(found.tools, path)
        return DeveloperMessage(content, tools, found.response_format, found.task)

    def _assistant(self, raw: Mapping[str, Any], path: str) -> Message:
        found = self.reading.check(_Assistant, raw, path)
        if found.__pydantic_extra__:
            self.reading.note_extra(found, path, faults=_ASSISTANT_FAULTS, losses=_ASSISTANT_LOSSES)
        if found.prefix is not None and found.wo_eos is not None and found.prefix != found.wo_eos:
            raise InvalidConversationError("prefix and wo_eos differ", where=path)
        calls = found.tool_calls or ()
        return AssistantMessage(
            self._content(found.content, path),
            read_reasoning(self.reading, found.__dict__, path),
            tuple([self._call(c, f"{path}.tool_calls[{i}]") for i, c in enumerate(calls)]),
            bool(found.prefix or found.wo_eos),
            found.task,
        )

    def _note_extra(self, found: WireModel, path: str) -> None:
        if found.__pydantic_extra__:
            self.reading.note_extra(found, path, faults=_FAULTS, losses=_LOSSES)

    def _content(self, value: Any, path: str) -> Content:
        if value is None:
            return ""
        if isinstance(value, str):
            return read_text(value, f"{path}.content")
        if not isinstance(value, list | tuple):
            raise InvalidConversationError(
                f"expected a string or a list of parts, got {kind_of(value)}",
                where=f"{path}.content",
                hint="write an object as JSON text" if isinstance(value, Mapping) else None,
            )
        return tuple([self._part(p, f"{path}.content[{i}]") for i, p in enumerate(value)])

    def _part(self, value: Any, path: str) -> TextPart | ImagePart | ExtractedUrl:
        kinds = {**_PARTS, "image_url": _ImagePart} if self.reading.images else _PARTS
        part = self.reading.tagged(value, path, kinds, _REFUSED_PARTS)
        if isinstance(part, _ImagePart):
            self.reading.note_extra(part.image_url, f"{path}.image_url")
            if part.image_url.detail in ("low", "high"):
                self.reading.left_out(f"{path}.image_url.detail", "images have one resolution")
            return ImagePart(part.image_url.url)
        if isinstance(part, _ExtractedUrlPart):
            return ExtractedUrl(read_text(part.url, f"{path}.url"))
        assert isinstance(part, _TextPart)
        return TextPart(read_text(part.text, f"{path}.text"))

    def _call(self, call: _Call, path: str) -> ToolCall:
        function = call.function
        if call.__pydantic_extra__:
            self.reading.note_extra(call, path, losses=_CALL_LOSSES)
        if function.__pydantic_extra__:
            self.reading.note_extra(function, f"{path}.function", losses=_CALL_LOSSES)
        if call.type not in (None, "function"):
            raise InvalidConversationError(
                "is not supported: expected 'function'", where=f"{path}.type"
            )
        # The reference encoder looks for the id inside the function too.
        call_id = function.id if call.id is None else call.id
        if function.id not in (None, call_id):
            raise InvalidConversationError("id and function.id differ", where=path)
        arguments = arguments_text(function.arguments, f"{path}.function.arguments")
        return ToolCall(read_text(function.name, f"{path}.function.name"), arguments, call_id)

    def tools(self, value: Sequence[Any] | None, path: str) -> tuple[Tool, ...]:
        """Read declared tools."""
        prefix = f"{path}.tools" if path else "tools"
        return tuple([self._declared(t, f"{prefix}[{i}]") for i, t in enumerate(value or ())])

    def _declared(self, value: Any, path: str) -> Tool:
        found = self.reading.check(_DeclaredTool, value, path)
        self.reading.note_extra(found, path)
        if found.type not in (None, "function"):
            raise InvalidConversationError(
                "is not supported: expected 'function'", where=f"{path}.type"
            )
        return read_tool(found.function, f"{path}.function")


def to_chat_message(message: Message) -> dict[str, Any]:
    """Write a message; `read_messages` of it gives the message back.

    Reasoning is written in both spellings in use, `reasoning_content` and `reasoning`. How a
    completion ended and its problems are not part of a message: a response has them elsewhere.
    """
    body: dict[str, Any] = {"role": message.role, "content": _written(message.content)}
    match message:
        case AssistantMessage():
            if message.reasoning_content is not None:
                body["reasoning_content"] = body["reasoning"] = message.reasoning_content
            if message.tool_calls:
                body["tool_calls"] = [_written_call(call) for call in message.tool_calls]
            if message.prefix:
                body["prefix"] = True
        case ToolMessage():
            if message.tool_call_id is not None:
                body["tool_call_id"] = message.tool_call_id
        case SystemMessage() | DeveloperMessage():
            if message.tools:
                body["tools"] = [to_chat_tool(tool) for tool in message.tools]
            if message.response_format is not None:
                body["response_format"] = dict(message.response_format)
        case UserMessage() | ReminderMessage():
            pass
    task = getattr(message, "task", None)
    return body if task is None else {**body, "task": task}


def to_chat_tool(tool: Tool) -> dict[str, Any]:
    """Write a declared tool."""
    return {"type": "function", "function": dict(tool.function)}


def _written(content: Content) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [_written_part(part) for part in content]


def _written_part(part: TextPart | ImagePart | ExtractedUrl) -> dict[str, Any]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            return {"type": "image_url", "image_url": {"url": part.url}}
        case ExtractedUrl():
            return {"type": "extracted_url", "url": part.url}


def _written_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    body = {"type": "function", "function": function}
    return body if call.id is None else {"id": call.id, **body}

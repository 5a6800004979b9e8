"""OpenAI's Chat Completions shape: messages and requests, read and written.

`read_messages` takes the messages of the published reference encoder: its `developer` role is a
turn of the search pipeline, and tools, `task` and `prefix` may sit on a message. In a request to an
API (`from_chat_request`) a developer is a system, as OpenAI means it.

Known fields that are ignored on purpose: `mask` (training only), `index` of a call (streaming
only), `cache_control` (prefix caching is automatic), `name` on a tool result (its call has it),
ids and signatures of reasoning. Known fields that the message format cannot hold (`name`
elsewhere, `annotations`) are left out under the policy `unknown`. An option that is null is absent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Strict

from hadal.chat.messages import (
    AssistantMessage,
    Content,
    Conversation,
    DeveloperMessage,
    ExtractedUrl,
    ImagePart,
    Message,
    NamedToolChoice,
    ReminderMessage,
    SystemMessage,
    Task,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMessage,
    UserMessage,
)
from hadal.chat.wire import (
    Reading,
    UnknownPolicy,
    WireModel,
    arguments_text,
    check_tool_choice,
    decide_mode,
    kind_of,
    read_body,
    read_text,
    read_thinking,
    says_something,
)
from hadal.errors import InvalidConversationError

__all__ = ["from_chat_request", "read_messages", "to_chat_message", "to_chat_request"]

_Items = Annotated[list[Any], Strict(False)]  # tuples too: messages may come from Python

_OPTIONS: Final = frozenset(
    "model temperature top_p top_k min_p max_tokens max_completion_tokens min_tokens stop "
    "stop_token_ids ignore_eos stream stream_options seed n logprobs top_logprobs "
    "presence_penalty frequency_penalty repetition_penalty logit_bias user parallel_tool_calls "
    "metadata store service_tier prediction modalities verbosity prompt_cache_key "
    "prompt_cache_retention safety_identifier add_generation_prompt continue_final_message "
    "include_reasoning".split()
)
_REQUEST_FAULTS: Final = {
    "functions": "declare them in `tools`",
    "function_call": "use `tool_choice`",
    "audio": "only text is supported",
    "web_search_options": "declare a search tool of your own in `tools`",
}
_ASSISTANT_ONLY: Final = dict.fromkeys(
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
_CALL_LOSSES: Final = dict.fromkeys(("provider_specific_fields", "extra_content"), "remove it")
_TEXT_ONLY: Final = "only text is supported"
_REFUSED_PARTS: Final = dict.fromkeys(
    "image_url input_image image input_audio audio video_url file refusal".split(), _TEXT_ONLY
)
_UNREADABLE: Final = "the reasoning is encrypted: send its text, or nothing"


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
    tools: _Items | None = None
    response_format: dict[str, Any] | None = None


class _Developer(_System):
    task: Task | None = None


class _Assistant(_User):
    tool_calls: Annotated[list[_Call], Strict(False)] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: _Items | None = None
    thinking_blocks: _Items | None = None
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


class _ReasoningDetail(WireModel):
    type: str
    text: str | None = None
    summary: str | None = None
    data: Any = None
    signature: str | None = None
    id: str | None = None
    format: str | None = None
    index: int | None = None


class _ThinkingBlock(WireModel):
    type: str
    thinking: str
    signature: str | None = None
    cache_control: Any = None


class _DeclaredTool(WireModel):
    function: dict[str, Any]
    type: str | None = None
    cache_control: Any = None


class _ReasoningField(WireModel):
    effort: Any = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: int | None = None
    summary: Any = None


class _TemplateFields(WireModel):
    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Any = None
    drop_thinking: bool | None = None


class _Request(WireModel):
    messages: _Items
    tools: _Items | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Any = None
    reasoning: Any = None
    thinking: Any = None
    chat_template_kwargs: Any = None


_PARTS: Final[dict[str, type[WireModel]]] = {"text": _TextPart, "extracted_url": _ExtractedUrlPart}
_DETAILS: Final = dict.fromkeys(
    ("reasoning.text", "reasoning.summary", "reasoning.encrypted"), _ReasoningDetail
)
_BLOCKS: Final = {"thinking": _ThinkingBlock}


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
    reader = _MessageReader(Reading(unknown, images=images))
    found = list(reader.reading.each(messages, "messages", reader.read))
    reader.reading.finish()
    return found


class _MessageReader:
    """Reads messages one by one; what is wrong gathers in `reading`."""

    def __init__(
        self, reading: Reading, *, developer: Literal["developer", "system"] = "developer"
    ):
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
            self._reasoning(found, path),
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
        return ToolCall(function.name, arguments, call_id)

    def _reasoning(self, found: _Assistant, path: str) -> str | None:
        """The one reasoning that all the spellings of it agree on."""
        given = list(self._spellings(found.__dict__, path))
        if found.provider_specific_fields is not None:
            inner = f"{path}.provider_specific_fields"
            given += self._spellings(found.provider_specific_fields, inner)
            for name, value in found.provider_specific_fields.items():
                if name not in _CARRIERS and says_something(value):
                    self.reading.left_out(f"{inner}.{name}", "unknown field")
        # A blank beside a text is a placeholder that some proxies add.
        texts = {text for _, text in given if text.strip()}
        if len(texts) > 1:
            spellings = ", ".join(where for where, _ in given)
            raise InvalidConversationError(f"these differ: {spellings}", where=given[0][0])
        return texts.pop() if texts else (given[0][1] if given else None)

    def _spellings(self, fields: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
        for name in _CARRIERS:
            value = fields.get(name)
            if value is None or value == []:
                continue
            where = f"{path}.{name}"
            if name in ("reasoning_content", "reasoning"):
                yield where, read_text(value, where)
            elif name == "thinking_blocks":
                blocks = self._tagged_list(value, where, _BLOCKS)
                yield where, "".join(getattr(block, "thinking") for block in blocks)
            else:
                yield where, self._details(value, where)

    def _details(self, value: Any, path: str) -> str:
        details = self._tagged_list(value, path, _DETAILS)
        # A summary is not what was thought: it only counts where there is nothing else.
        for field in ("text", "summary"):
            texts = [text for d in details if (text := getattr(d, field)) is not None]
            if texts:
                return read_text("".join(texts), path)
        raise InvalidConversationError("no text among them", where=path, hint=_UNREADABLE)

    def _tagged_list(
        self, value: Any, path: str, models: Mapping[str, type[WireModel]]
    ) -> list[WireModel]:
        if not isinstance(value, list | tuple):
            raise InvalidConversationError(f"expected a list, got {kind_of(value)}", where=path)
        refused = {"redacted_thinking": _UNREADABLE}
        return [
            self.reading.tagged(v, f"{path}[{i}]", models, refused) for i, v in enumerate(value)
        ]

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
        if not read_text(found.function.get("name"), f"{path}.function.name"):
            raise InvalidConversationError("is empty", where=f"{path}.function.name")
        return Tool(found.function)


_CARRIERS: Final = ("reasoning_content", "reasoning", "reasoning_details", "thinking_blocks")
"""Every field in which some client sends the reasoning of an assistant back."""

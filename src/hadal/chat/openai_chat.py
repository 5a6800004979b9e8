"""Requests in OpenAI's Chat Completions shape, read and written.

In a request the `developer` role means system, as OpenAI defines it. Every spelling in use of
"think" is understood: `reasoning_effort`, `reasoning`, `thinking` and `chat_template_kwargs`.
Sampling, limits and whatever else is known but says nothing about the conversation goes untouched
into `Conversation.options`; an option that is null is absent, as the API has it.

Messages alone: `openai_messages`, whose functions are offered here too.
"""

from collections.abc import Mapping
from typing import Any, Final

from hadal.chat.controls import (
    check_tool_choice,
    decide_mode,
    read_thinking,
    read_tool_choice,
    written_thinking,
)
from hadal.chat.messages import (
    Conversation,
    DeveloperMessage,
    Mode,
    NamedToolChoice,
    SystemMessage,
    ToolChoice,
)
from hadal.chat.openai_messages import (
    MessageReader,
    read_messages,
    to_chat_message,
    to_chat_tool,
)
from hadal.chat.wire import (
    Items,
    Reading,
    UnknownPolicy,
    WireModel,
    kind_of,
    read_body,
    take_options,
)
from hadal.errors import InvalidConversationError

__all__ = ["from_chat_request", "read_messages", "to_chat_message", "to_chat_request"]

_OPTIONS: Final = frozenset(
    "model temperature top_p top_k min_p max_tokens max_completion_tokens min_tokens stop "
    "stop_token_ids ignore_eos stream stream_options seed n logprobs top_logprobs "
    "presence_penalty frequency_penalty repetition_penalty logit_bias user parallel_tool_calls "
    "metadata store service_tier prediction modalities verbosity prompt_cache_key "
    "prompt_cache_retention safety_identifier add_generation_prompt continue_final_message "
    "include_reasoning return_token_ids".split()
)
_REQUEST_FAULTS: Final = {
    "functions": "declare them in `tools`",
    "function_call": "use `tool_choice`",
    "audio": "only text is supported",
    "web_search_options": "declare a search tool of your own in `tools`",
}


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


class _Name(WireModel):
    name: str


class _NamedChoice(WireModel):
    type: str
    function: _Name


class _Request(WireModel):
    messages: Items
    tools: Items | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Any = None
    reasoning: Any = None
    thinking: Any = None
    chat_template_kwargs: Any = None


def from_chat_request(
    body: Mapping[str, Any] | bytes | str, *, unknown: UnknownPolicy = "error"
) -> Conversation:
    """Read a request.

    Args:
        body: The JSON object, parsed or not.
        unknown: Whether a field that would be left out is an error or a logged warning.

    Raises:
        InvalidConversationError: The body does not have the shape; every fault is listed, and
            `where` is the path of the first.
    """
    reading = Reading(unknown)
    found = reading.check(_Request, read_body(body), "")
    return reading.settle(lambda: _conversation(reading, found))


def to_chat_request(conversation: Conversation) -> dict[str, Any]:
    """Write a request; `from_chat_request` of it gives the conversation back.

    Raises:
        InvalidConversationError: It has a `DeveloperMessage`, which would be read as a system.
    """
    for place, message in enumerate(conversation.messages):
        if isinstance(message, DeveloperMessage):
            raise InvalidConversationError(
                "in a request the role developer means system",
                where=f"messages[{place}]",
                hint="write the messages alone with to_chat_message",
            )
    options = dict(conversation.options)
    thinking = written_thinking(conversation.mode, options.pop("thinking", {}))
    choice = conversation.tool_choice
    body: dict[str, Any] = {
        **options,
        "messages": [to_chat_message(message) for message in conversation.messages],
        "tools": [to_chat_tool(tool) for tool in conversation.tools] or None,
        "tool_choice": _written_choice(choice) if choice != "auto" else None,
        "response_format": conversation.response_format and dict(conversation.response_format),
        "thinking": thinking or None,
        "reasoning_effort": conversation.effort,
    }
    return {name: value for name, value in body.items() if value is not None}


def _written_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if isinstance(choice, NamedToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _conversation(reading: Reading, found: _Request) -> Conversation:
    reader = MessageReader(reading, developer="system")
    messages = tuple(reading.each(found.messages, "messages", reader.read))
    options = take_options(reading, found, _OPTIONS, _REQUEST_FAULTS)
    if options.get("modalities", ["text"]) != ["text"]:
        raise InvalidConversationError("only text is supported", where="modalities")
    tools = reader.tools(found.tools, "")
    choice = _tool_choice(reading, found.tool_choice)
    on_messages = [t for m in messages if isinstance(m, SystemMessage) for t in m.tools]
    check_tool_choice(choice, [*tools, *on_messages], "tool_choice")
    mode, effort = _thinking(reading, found, options)
    response_format = _response_format(found.response_format)
    return Conversation(messages, tools, choice, response_format, mode, effort, options)


def _tool_choice(reading: Reading, value: Any) -> ToolChoice:
    def named() -> str:
        chosen = reading.tagged(value, "tool_choice", {"function": _NamedChoice})
        reading.note_extra(chosen.function, "tool_choice.function")
        return chosen.function.name

    return read_tool_choice(value, named)


def _response_format(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None or value.get("type") == "text":
        return None
    if value.get("type") not in ("json_object", "json_schema"):
        raise InvalidConversationError(
            "expected 'text', 'json_object' or 'json_schema'", where="response_format.type"
        )
    if value["type"] == "json_schema" and not isinstance(value.get("json_schema"), dict):
        raise InvalidConversationError(
            f"expected an object, got {kind_of(value.get('json_schema'))}",
            where="response_format.json_schema",
        )
    return value


def _thinking(
    reading: Reading, found: _Request, options: dict[str, Any]
) -> tuple[Mode | None, str | None]:
    """Mode and effort; what else those fields say goes into the options."""
    switched, thinking = read_thinking(reading, found.thinking, "thinking")
    reasoning = _nested(reading, _ReasoningField, found.reasoning, "reasoning")
    template = _nested(reading, _TemplateFields, found.chat_template_kwargs, "chat_template_kwargs")
    efforts = {
        "reasoning_effort": found.reasoning_effort,
        "reasoning.effort": reasoning.pop("effort", None),
        "chat_template_kwargs.reasoning_effort": template.pop("reasoning_effort", None),
    }
    switches = [
        switched,
        reasoning.pop("enabled", None),
        template.pop("thinking", None),
        template.pop("enable_thinking", None),
    ]
    rest = {"thinking": thinking, "reasoning": reasoning, "chat_template_kwargs": template}
    options.update({name: value for name, value in rest.items() if value})
    return decide_mode(switches, efforts)


def _nested(reading: Reading, model: type[WireModel], value: Any, path: str) -> dict[str, Any]:
    """Check an object and return its known fields that have a value."""
    if value is None:
        return {}
    found = reading.check(model, value, path)
    reading.note_extra(found, path)
    return found.model_dump(exclude_none=True, exclude=set(found.__pydantic_extra__ or {}))

"""Anthropic's Messages shape: requests read and written.

A last message of the assistant without calls is a prefix to continue, as that API defines it.
Response formats take the spelling of Chat Completions. Ignored on purpose: `cache_control` and
`eager_input_streaming`, because caching and streaming are automatic.

Messages and their blocks: `anthropic_messages`, whose public names are offered here too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field

from hadal.chat.anthropic_messages import (
    SERVER_TOOL_HINT,
    TOOL_ERROR_MARK,
    read_content,
    read_message,
    thinking_signature,
    to_anthropic_content,
    written_content,
    written_messages,
)
from hadal.chat.controls import check_tool_choice, decide_mode, read_thinking, written_thinking
from hadal.chat.messages import (
    AssistantMessage,
    Conversation,
    Message,
    NamedToolChoice,
    SystemMessage,
    Tool,
    ToolChoice,
)
from hadal.chat.wire import (
    Items,
    Reading,
    UnknownPolicy,
    WireModel,
    read_body,
    read_text,
    read_tool,
    refuse_loss,
    shown,
    take_options,
)
from hadal.errors import InvalidConversationError

__all__ = [
    "TOOL_ERROR_MARK",
    "from_anthropic_request",
    "thinking_signature",
    "to_anthropic_content",
    "to_anthropic_request",
]

_OPTIONS: Final = frozenset(
    "model max_tokens stop_sequences stream temperature top_k top_p metadata service_tier "
    "inference_geo speed context_management betas".split()
)
_FAULTS: Final = {
    "container": "code does not run on this server",
    "mcp_servers": "call them yourself, and declare their tools in `tools`",
}
_TOOL_LOSSES: Final[dict[str, str]] = dict.fromkeys(
    ("defer_loading", "allowed_callers", "input_examples"), "remove it"
)


class _Tool(WireModel):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Any = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None


class _ToolChoice(WireModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Format(WireModel):
    type: Literal["json_schema"]
    # an alias, because pydantic's models have a method of that name
    schema_: dict[str, Any] = Field(alias="schema")


class _OutputConfig(WireModel):
    effort: Any = None
    format: Any = None


class _Request(WireModel):
    messages: Items
    system: Any = None
    tools: Items | None = None
    tool_choice: Any = None
    thinking: Any = None
    output_config: Any = None
    output_format: Any = None
    cache_control: Any = None


def from_anthropic_request(
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


def _conversation(reading: Reading, found: _Request) -> Conversation:
    options = take_options(reading, found, _OPTIONS, _FAULTS)
    read = reading.each(found.messages, "messages", lambda m, p: read_message(reading, m, p))
    messages = [message for several in read for message in several]
    if messages and isinstance(last := messages[-1], AssistantMessage) and not last.tool_calls:
        messages[-1] = replace(last, prefix=True)
    if found.system is not None and found.system != []:
        messages.insert(0, SystemMessage(read_content(reading, found.system, "system")))
    tools = tuple(reading.each(found.tools or (), "tools", lambda t, p: _tool(reading, t, p)))
    choice = _tool_choice(reading, found.tool_choice, options)
    check_tool_choice(choice, tools, "tool_choice")
    output = _OutputConfig()
    if found.output_config is not None:
        output = reading.check(_OutputConfig, found.output_config, "output_config")
        reading.note_extra(output, "output_config")
    response_format = _response_format(
        reading, {"output_config.format": output.format, "output_format": found.output_format}
    )
    switched, rest = read_thinking(reading, found.thinking, "thinking")
    if rest:
        options["thinking"] = rest
    mode, effort = decide_mode([switched], {"output_config.effort": output.effort})
    return Conversation(tuple(messages), tools, choice, response_format, mode, effort, options)


def _tool(reading: Reading, value: Any, path: str) -> Tool:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in (None, "custom"):
        raise InvalidConversationError(
            f"type {shown(kind)} runs on a server", where=path, hint=SERVER_TOOL_HINT
        )
    found = reading.check(_Tool, value, path)
    reading.note_extra(found, path, losses=_TOOL_LOSSES)
    function: dict[str, Any] = {"name": found.name}
    if found.description is not None:
        function["description"] = found.description
    function["parameters"] = found.input_schema
    if found.strict is not None:
        function["strict"] = found.strict
    return read_tool(function, path)


def _tool_choice(reading: Reading, value: Any, options: dict[str, Any]) -> ToolChoice:
    if value is None:
        return "auto"
    found = reading.check(_ToolChoice, value, "tool_choice")
    reading.note_extra(found, "tool_choice")
    if found.disable_parallel_tool_use is not None:
        options["disable_parallel_tool_use"] = found.disable_parallel_tool_use
    if found.type == "tool":
        return NamedToolChoice(read_text(found.name, "tool_choice.name"))
    return "required" if found.type == "any" else found.type


def _response_format(reading: Reading, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The format in the spelling of Chat Completions."""
    given = {path: value for path, value in values.items() if value is not None}
    formats: list[dict[str, Any]] = []
    for path, value in given.items():
        found = reading.check(_Format, value, path)
        reading.note_extra(found, path)
        formats.append({"type": "json_schema", "json_schema": {"schema": found.schema_}})
    if len(formats) > 1 and formats[0] != formats[1]:
        raise InvalidConversationError("these differ", where=", ".join(given))
    return formats[0] if formats else None


def to_anthropic_request(conversation: Conversation) -> dict[str, Any]:
    """Write a request; `from_anthropic_request` of it gives the conversation back.

    Raises:
        InvalidConversationError: The API has no place for something: the roles developer and
            latest_reminder, tools or a task on a message, a result without id, a response format
            other than a bare schema; or the last message is the assistant's and neither a prefix
            nor a call, which would be read as a prefix.
    """
    options = dict(conversation.options)
    thinking = written_thinking(conversation.mode, options.pop("thinking", {}))
    parallel = options.pop("disable_parallel_tool_use", None)
    output = {"effort": conversation.effort, "format": _written_format(conversation)}
    system, rest = _split_system(conversation.messages)
    body: dict[str, Any] = {
        **options,
        "system": system,
        "messages": written_messages(rest, first=len(conversation.messages) - len(rest)),
        "tools": [_written_tool(tool) for tool in conversation.tools] or None,
        "tool_choice": _written_choice(conversation.tool_choice, parallel),
        "thinking": thinking or None,
        "output_config": {n: v for n, v in output.items() if v is not None} or None,
    }
    return {name: value for name, value in body.items() if value is not None}


def _split_system(
    messages: Sequence[Message],
) -> tuple[str | list[dict[str, Any]] | None, Sequence[Message]]:
    if not messages or not isinstance(first := messages[0], SystemMessage):
        return None, messages
    refuse_loss(first, "messages[0]", "Messages", ("tools", "response_format"))
    return written_content(first.content, "messages[0]"), messages[1:]


def _written_tool(tool: Tool) -> dict[str, Any]:
    function = dict(tool.function)
    if "parameters" not in function:
        raise InvalidConversationError(f"the Messages API requires parameters: {tool.name!r:.80}")
    schema = function.pop("parameters")
    unknown = sorted(function.keys() - {"name", "description", "strict"})
    if unknown:
        raise InvalidConversationError(
            f"the Messages API has no place for {unknown} of the tool {tool.name!r:.80}"
        )
    return {**function, "input_schema": schema}


def _written_choice(choice: ToolChoice, parallel: bool | None) -> dict[str, Any] | None:
    if isinstance(choice, NamedToolChoice):
        body: dict[str, Any] = {"type": "tool", "name": choice.name}
    elif choice != "auto" or parallel is not None:
        body = {"type": "any" if choice == "required" else choice}
    else:
        return None
    return body if parallel is None else {**body, "disable_parallel_tool_use": parallel}


def _written_format(conversation: Conversation) -> dict[str, Any] | None:
    wanted = conversation.response_format
    if wanted is None:
        return None
    nested = wanted.get("json_schema")
    schema = nested.get("schema") if isinstance(nested, Mapping) and len(nested) == 1 else None
    if schema is None or len(wanted) != 2:  # its type and the schema
        raise InvalidConversationError(
            "the Messages API takes a bare JSON schema", where="response_format"
        )
    return {"type": "json_schema", "schema": schema}

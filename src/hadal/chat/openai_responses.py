"""OpenAI's Responses shape: requests read, input and output items written.

Roles `developer` and `system` both mean system, and `instructions` are a first system message. What
the server has to resolve (`previous_response_id`, `conversation`) goes to the options. The effort
"none" is chat mode; there is no other switch. How items become messages: `responses_items`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from hadal.chat.controls import check_tool_choice, decide_mode, read_tool_choice
from hadal.chat.messages import (
    AssistantMessage,
    Content,
    Conversation,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMessage,
    UserMessage,
)
from hadal.chat.outcome import Termination
from hadal.chat.responses_items import read_input
from hadal.chat.sealed import seal
from hadal.chat.wire import (
    Items,
    Reading,
    UnknownPolicy,
    WireModel,
    parts_of,
    read_body,
    read_text,
    read_tool,
    refuse_loss,
    take_options,
)
from hadal.errors import InvalidConversationError

__all__ = ["from_responses_request", "to_responses_input", "to_responses_output"]

_OPTIONS: Final = frozenset(
    "model temperature top_p max_output_tokens max_tool_calls stream stream_options store metadata "
    "user parallel_tool_calls previous_response_id conversation include truncation service_tier "
    "prompt_cache_key prompt_cache_retention safety_identifier background top_logprobs "
    "context_management".split()
)
_FAULTS: Final = {"prompt": "stored prompts live on another server: send the text"}


class _FunctionTool(WireModel):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _NamedChoice(WireModel):
    type: str
    name: str


class _Format(WireModel):
    type: Literal["text", "json_object", "json_schema"]


class _TextField(WireModel):
    format: Any = None
    verbosity: str | None = None


class _ReasoningField(WireModel):
    effort: Any = None
    summary: Any = None
    generate_summary: Any = None


class _Request(WireModel):
    input: Any = None
    instructions: str | None = None
    tools: Items | None = None
    tool_choice: Any = None
    text: Any = None
    reasoning: Any = None


def from_responses_request(
    body: Mapping[str, Any] | bytes | str, *, unknown: UnknownPolicy = "error"
) -> Conversation:
    """Read a request.

    Args:
        body: The JSON object, parsed or not.
        unknown: Whether a field that would be left out is an error or a logged warning.

    Raises:
        InvalidConversationError: The body does not have the shape, or a result has no call (calls
            of a previous response are the server's to find); all faults are listed.
    """
    reading = Reading(unknown)
    found = reading.check(_Request, read_body(body), "")
    return reading.settle(lambda: _conversation(reading, found))


def _conversation(reading: Reading, found: _Request) -> Conversation:
    options = take_options(reading, found, _OPTIONS, _FAULTS)
    elsewhere = "previous_response_id" in options or "conversation" in options
    messages = read_input(reading, found.input, history_elsewhere=elsewhere)
    if found.instructions is not None:
        messages.insert(0, SystemMessage(read_text(found.instructions, "instructions")))
    tools = tuple(reading.each(found.tools or (), "tools", lambda t, p: _tool(reading, t, p)))
    choice = _tool_choice(reading, found.tool_choice)
    check_tool_choice(choice, tools, "tool_choice")
    response_format = None
    if found.text is not None:
        text = reading.check(_TextField, found.text, "text")
        reading.note_extra(text, "text")
        response_format = _response_format(reading, text.format)
        if text.verbosity is not None:
            options["text"] = {"verbosity": text.verbosity}
    effort = None
    if found.reasoning is not None:
        reasoning = reading.check(_ReasoningField, found.reasoning, "reasoning")
        reading.note_extra(reasoning, "reasoning")
        effort = reasoning.effort
        if rest := reasoning.model_dump(include={"summary", "generate_summary"}, exclude_none=True):
            options["reasoning"] = rest
    mode, effort = decide_mode([], {"reasoning.effort": effort})
    return Conversation(tuple(messages), tools, choice, response_format, mode, effort, options)


def _tool(reading: Reading, value: Any, path: str) -> Tool:
    kind = value.get("type") if isinstance(value, Mapping) else None
    hint = "run the tool yourself and declare it as a function"
    refused = {kind: hint} if isinstance(kind, str) else {}
    found = reading.tagged(value, path, {"function": _FunctionTool}, refused)
    # The order of the published examples, whatever the client's: the model sees it.
    names = ("name", "description", "parameters", "strict")
    given = {name: getattr(found, name) for name in names}
    return read_tool({name: v for name, v in given.items() if v is not None}, path)


def _tool_choice(reading: Reading, value: Any) -> ToolChoice:
    models = {"function": _NamedChoice}
    return read_tool_choice(value, lambda: reading.tagged(value, "tool_choice", models).name)


def _response_format(reading: Reading, value: Any) -> dict[str, Any] | None:
    """The format in the spelling of Chat Completions, which nests the schema."""
    if value is None:
        return None
    found = reading.check(_Format, value, "text.format")
    rest = {name: v for name, v in value.items() if name != "type" and v is not None}
    if found.type == "json_schema":
        if not isinstance(rest.get("schema"), Mapping):
            raise InvalidConversationError("expected an object", where="text.format.schema")
        return {"type": "json_schema", "json_schema": rest}
    reading.note_extra(found, "text.format")
    return {"type": "json_object"} if found.type == "json_object" else None


def to_responses_output(
    message: AssistantMessage, *, response_id: str, sealed: bool = False
) -> list[dict[str, Any]]:
    """Write what the model said as output items.

    Ids derive from `response_id`, so that the same response always has the same ones. A call
    without an id gets one. With `sealed` the reasoning also has its opaque form, for clients that
    send nothing else back.

    Raises:
        InvalidConversationError: The content holds something other than text.
    """
    stem = response_id.removeprefix("resp_")
    cut = {Termination.LENGTH_IN_REASONING: "reasoning", Termination.LENGTH_IN_CONTENT: "message"}
    cut_kind = cut.get(message.termination) if message.termination else None
    items: list[dict[str, Any]] = []
    if message.reasoning_content is not None:
        opaque = {"encrypted_content": seal(message.reasoning_content)} if sealed else {}
        written = _written_reasoning(message.reasoning_content)
        items.append({"id": f"rs_{stem}", **written, **opaque})
    texts = parts_of(message.content, "content")
    if any(texts) or not (items or message.tool_calls):
        parts = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
        items.append(
            {"id": f"msg_{stem}", "type": "message", "role": "assistant", "content": parts}
        )
    for place, call in enumerate(message.tool_calls):
        call_id = f"call_{stem}_{place}" if call.id is None else call.id
        items.append({"id": f"fc_{stem}_{place}", **_written_call(call, call_id)})
    return [
        {**item, "status": "incomplete" if item["type"] == cut_kind else "completed"}
        for item in items
    ]


def to_responses_input(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Write messages as input items; reading them gives the messages back.

    Raises:
        InvalidConversationError: There is no item for something: the roles developer and
            latest_reminder, tools or a task on a message, a prefix, a call or result without id,
            two assistant messages in a row (they would be read as one turn).
    """
    items: list[dict[str, Any]] = []
    reasoned = False
    previous: Message | None = None
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        refuse_loss(message, where, "Responses", ("tools", "response_format", "task", "prefix"))
        match message:
            case AssistantMessage():
                if isinstance(previous, AssistantMessage):
                    raise InvalidConversationError("two assistant messages in a row", where=where)
                turn = _written_turn(message, where, after_reasoning=reasoned)
                reasoned = turn[0]["type"] == "reasoning"
                items += turn
            case ToolMessage(content, call_id):
                if call_id is None:
                    raise InvalidConversationError("the result has no call id", where=where)
                output = _written(content, "input_text", where)
                items.append({"type": "function_call_output", "call_id": call_id, "output": output})
            case UserMessage(content) | SystemMessage(content):
                body = _written(content, "input_text", where)
                items.append({"type": "message", "role": message.role, "content": body})
            case _:
                raise InvalidConversationError(f"no item for role {message.role}", where=where)
        previous = message
    return items


def _written_turn(
    message: AssistantMessage, where: str, *, after_reasoning: bool
) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if message.reasoning_content is not None:
        items.append(_written_reasoning(message.reasoning_content))
    if message.content != "" or not (items or message.tool_calls):
        content = _written(message.content, "output_text", where)
        items.append({"type": "message", "role": "assistant", "content": content})
    for call in message.tool_calls:
        if call.id is None:
            raise InvalidConversationError("a call has no id", where=where)
        items.append(_written_call(call, call.id))
    if after_reasoning and items[0]["type"] == "function_call":
        # Without it, the calls would be read as more parallel calls of the turn before.
        items.insert(0, {"type": "reasoning", "summary": []})
    return items


def _written(content: Content, kind: str, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": kind, "text": text} for text in parts_of(content, where)]


def _written_reasoning(text: str) -> dict[str, Any]:
    parts = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [], "content": parts}


def _written_call(call: ToolCall, call_id: str) -> dict[str, Any]:
    body = {"type": "function_call", "call_id": call_id}
    return {**body, "name": call.name, "arguments": call.arguments}

"""Messages and content blocks of Anthropic's Messages shape, read and written.

A user message with results and text becomes several messages, in block order. The role `system` is
taken within `messages` too, since agents send it there.

The signature of a thinking block holds its text again (`sealed`), which is read where a client left
the text out; another server's is not kept. The message format has no error flag for a result, and
dropping it would show a failure as a success: a result with `is_error` begins with the line
`TOOL_ERROR_MARK`. A text block behind a call moves before it, and several thinking blocks of one
message become one, parted by blank lines. Requests: `anthropic`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

from hadal.chat.messages import (
    AssistantMessage,
    Content,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.reasoning_fields import UNREADABLE_HINT
from hadal.chat.sealed import is_sealed, seal, unseal
from hadal.chat.wire import (
    Reading,
    WireModel,
    arguments_text,
    join_texts,
    kind_of,
    parts_of,
    read_text,
    refuse_loss,
)
from hadal.errors import InvalidConversationError

__all__ = [
    "SERVER_TOOL_HINT",
    "TOOL_ERROR_MARK",
    "read_content",
    "read_message",
    "to_anthropic_content",
    "written_content",
    "written_messages",
]

ModelT = TypeVar("ModelT", bound=WireModel)

TOOL_ERROR_MARK: Final = "[tool error]"
"""First line of the content of a result that came with `is_error`."""

SERVER_TOOL_HINT: Final = "tools do not run on this server: declare your own in `tools`"
_REFUSED: Final[dict[str, str]] = {
    **dict.fromkeys(("image", "document", "search_result"), "only text is supported"),
    **dict.fromkeys(
        "server_tool_use web_search_tool_result web_fetch_tool_result mcp_tool_use mcp_tool_result "
        "code_execution_tool_result bash_code_execution_tool_result container_upload "
        "text_editor_code_execution_tool_result tool_search_tool_result tool_reference".split(),
        SERVER_TOOL_HINT,
    ),
    "redacted_thinking": UNREADABLE_HINT,
    "compaction": "send the messages themselves",
}
_BLOCK_LOSSES: Final = {"citations": "put what the model should see into the text"}


class _Text(WireModel):
    type: str
    text: str
    cache_control: Any = None


class _Thinking(WireModel):
    type: str
    thinking: str
    signature: str | None = None
    cache_control: Any = None


class _ToolUse(WireModel):
    type: str
    id: str
    name: str
    input: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None
    cache_control: Any = None


class _ToolResult(WireModel):
    type: str
    tool_use_id: str
    content: Any = None
    is_error: bool | None = None
    cache_control: Any = None


class _Message(WireModel):
    role: Literal["user", "assistant", "system"]
    content: Any


_TEXT_BLOCKS: Final = {"text": _Text}
_USER_BLOCKS: Final[dict[str, type[WireModel]]] = {"text": _Text, "tool_result": _ToolResult}
_ASSISTANT_BLOCKS: Final[dict[str, type[WireModel]]] = {
    "text": _Text,
    "thinking": _Thinking,
    "tool_use": _ToolUse,
}


def read_message(reading: Reading, raw: Any, path: str) -> list[Message]:
    """Read one message; a user message with results becomes several, in block order.

    Raises:
        InvalidConversationError: It does not have the shape.
    """
    found = reading.check(_Message, raw, path)
    reading.note_extra(found, path)
    where = f"{path}.content"
    if found.role == "system":
        return [SystemMessage(read_content(reading, found.content, where))]
    if found.role == "user":
        return _user(reading, found.content, where)
    return [_assistant(reading, found.content, where)]


def _user(reading: Reading, value: Any, path: str) -> list[Message]:
    messages: list[Message] = []
    texts: list[str] = []
    for block, where in _blocks(reading, value, path, _USER_BLOCKS):
        if isinstance(block, _Text):
            texts.append(read_text(block.text, f"{where}.text"))
            continue
        assert isinstance(block, _ToolResult)
        if texts:
            messages.append(UserMessage(join_texts(texts)))
            texts = []
        content = read_content(
            reading, block.content, f"{where}.content", failed=bool(block.is_error)
        )
        messages.append(ToolMessage(content, block.tool_use_id))
    if texts or not messages:
        messages.append(UserMessage(join_texts(texts)))
    return messages


def _thought(block: _Thinking, where: str) -> str:
    """Return the reasoning of a block: sealed in its signature if the text was left out."""
    text = read_text(block.thinking, f"{where}.thinking")
    if text.strip() or not is_sealed(block.signature):
        return text
    assert block.signature is not None
    return unseal(block.signature, f"{where}.signature")


def _assistant(reading: Reading, value: Any, path: str) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block, where in _blocks(reading, value, path, _ASSISTANT_BLOCKS):
        match block:
            case _Text():
                texts.append(read_text(block.text, f"{where}.text"))
            case _Thinking():
                thoughts.append(_thought(block, where))
            case _:
                assert isinstance(block, _ToolUse)
                if (block.caller or {}).get("type", "direct") != "direct":
                    reading.left_out(f"{where}.caller", "calls made by code", SERVER_TOOL_HINT)
                arguments = arguments_text(block.input, f"{where}.input")
                name = read_text(block.name, f"{where}.name")
                calls.append(ToolCall(name, arguments, block.id))
    # Blanks among several blocks are placeholders.
    kept = [t for t in thoughts if t.strip()] or thoughts[:1]
    reasoning = "\n\n".join(kept) if kept else None
    return AssistantMessage(join_texts(texts), reasoning, tuple(calls))


def _blocks(
    reading: Reading, value: Any, path: str, models: Mapping[str, type[ModelT]]
) -> Iterator[tuple[ModelT | _Text, str]]:
    """Each block with its path; a string is one text block."""
    if isinstance(value, str):
        yield _Text(type="text", text=value), path
        return
    if not isinstance(value, list | tuple):
        raise InvalidConversationError(
            f"expected a string or a list of blocks, got {kind_of(value)}", where=path
        )
    for place, item in enumerate(value):
        where = f"{path}[{place}]"
        yield reading.tagged(item, where, models, _REFUSED, losses=_BLOCK_LOSSES), where


def read_content(reading: Reading, value: Any, path: str, *, failed: bool = False) -> Content:
    """Read text or text blocks; absent is empty.

    Args:
        reading: Where left-out fields gather.
        value: A string, a list of text blocks, or None.
        path: Where it is.
        failed: Whether the text is the result of a tool that reported an error.

    Raises:
        InvalidConversationError: Something else than text.
    """
    blocks = () if value is None else _blocks(reading, value, path, _TEXT_BLOCKS)
    texts = [read_text(block.text, where) for block, where in blocks]
    if failed:
        texts[:1] = ["\n".join([TOOL_ERROR_MARK, *texts[:1]])]
    return join_texts(texts)


def to_anthropic_content(message: AssistantMessage) -> list[dict[str, Any]]:
    """Write what the model said as content blocks: thinking, text, calls.

    Raises:
        InvalidConversationError: The content holds something other than text, a call has no id, or
            its arguments are not a JSON object.
    """
    blocks: list[dict[str, Any]] = []
    if message.reasoning_content is not None:
        # Some clients drop a thinking block that has no signature field, some all but that field.
        thinking = {"type": "thinking", "thinking": message.reasoning_content}
        blocks.append({**thinking, "signature": seal(message.reasoning_content)})
    if message.content != "":
        blocks += [{"type": "text", "text": text} for text in parts_of(message.content, "content")]
    for place, call in enumerate(message.tool_calls):
        if call.id is None:
            raise InvalidConversationError("has no id", where=f"tool_calls[{place}]")
        use = {"type": "tool_use", "id": call.id, "name": call.name}
        blocks.append({**use, "input": call.parsed()})
    return blocks


def written_messages(messages: Sequence[Message], first: int) -> list[dict[str, Any]]:
    """Write messages; results and the text behind them share one user message.

    Args:
        messages: In order.
        first: Place of the first one in the conversation, for errors.

    Raises:
        InvalidConversationError: The API has no place for a message or a field of it, or the last
            message is the assistant's and neither a prefix nor a call.
    """
    body: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []  # blocks of the user message that the next text completes
    for place, message in enumerate(messages):
        where = f"messages[{first + place}]"
        refuse_loss(message, where, "Messages", ("tools", "response_format", "task"))
        if isinstance(message, ToolMessage):
            if not results:
                body.append({"role": "user", "content": results})
            results.append(_written_result(message, where))
            continue
        if isinstance(message, UserMessage) and results and message.content != ():
            results += [{"type": "text", "text": t} for t in parts_of(message.content, where)]
            results = []
            continue
        results = []
        match message:
            case AssistantMessage():
                last = place == len(messages) - 1
                if message.prefix != (last and not message.tool_calls):
                    raise InvalidConversationError(
                        "a last assistant message without calls is a prefix here, and no other is",
                        where=where,
                    )
                body.append({"role": "assistant", "content": to_anthropic_content(message)})
            case UserMessage(content) | SystemMessage(content):
                body.append({"role": message.role, "content": written_content(content, where)})
            case _:
                raise InvalidConversationError(
                    f"the Messages API has no role {message.role}", where=where
                )
    return body


def _written_result(message: ToolMessage, where: str) -> dict[str, Any]:
    if message.tool_call_id is None:
        raise InvalidConversationError("the result has no call id", where=where)
    body = {"type": "tool_result", "tool_use_id": message.tool_call_id}
    return {**body, "content": written_content(message.content, where)}


def written_content(content: Content, where: str) -> str | list[dict[str, Any]]:
    """Write text, or a list of text blocks.

    Raises:
        InvalidConversationError: A part is not text.
    """
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": text} for text in parts_of(content, where)]

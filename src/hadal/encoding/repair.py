"""The default face: put a conversation into the shape that the model was trained on.

The published reference renders some ordinary requests into something the model never saw. Each
function here undoes one such defect and says what the reference does instead; the strict face does
not come through here. The result is messages in the reference's own keys, for the same renderer.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hadal.chat.messages import (
    AssistantMessage,
    Content,
    DeveloperMessage,
    ExtractedUrl,
    ImagePart,
    Message,
    ReminderMessage,
    SystemMessage,
    TextPart,
    Tool,
    ToolMessage,
    UserMessage,
)
from hadal.encoding.dsml import json_text
from hadal.encoding.generations import Generation
from hadal.encoding.passes import Dict
from hadal.encoding.tokens import EXTRACTED_URL, IMAGE
from hadal.errors import InvalidConversationError

__all__ = ["arrange", "calls_tools", "place_declarations", "to_reference"]

logger = logging.getLogger(__name__)


def arrange(messages: Iterable[Message], generation: Generation) -> list[Message]:
    """Move what stands where the format has no place for it.

    - Leading system messages become one, joined by a blank line (reference: glued together).
    - V4: a later system message becomes text of the user's turn (reference: bare text, glued to
      its neighbours, and no generation prompt after it). V4.1 has a place for it.
    - A reminder after a user turn moves in front of it (reference: it lands after the assistant's
      marker, and the prompt ends in it).
    """
    arranged: list[Message] = []
    turn_start = 0  # where the user turn that is being written began
    for message in messages:
        if isinstance(message, SystemMessage):
            if all(isinstance(m, SystemMessage) for m in arranged):
                arranged = [_joined(arranged, message)]
                turn_start = 1
                continue
            if message.tools or message.response_format:
                raise InvalidConversationError(
                    "tools and response_format can be declared only before the first turn, "
                    "got them on a later system message",
                    hint="pass tools=... for the whole conversation",
                )
            if generation.has_system_token:
                arranged.append(message)
                turn_start = len(arranged)
                continue
            message = UserMessage(message.content)
        if isinstance(message, ReminderMessage):
            arranged.insert(turn_start, message)
            turn_start += 1
            continue
        arranged.append(message)
        if not isinstance(message, UserMessage | ToolMessage | DeveloperMessage):
            turn_start = len(arranged)
    return arranged


def _joined(before: Sequence[Message], message: SystemMessage) -> SystemMessage:
    if not before:
        return message
    first = before[0]
    assert isinstance(first, SystemMessage)
    if first.response_format and message.response_format:
        raise InvalidConversationError("two system messages declare a response_format")
    texts = [t for t in (_text(first.content), _text(message.content)) if t]
    return SystemMessage(
        "\n\n".join(texts),
        (*first.tools, *message.tools),
        first.response_format or message.response_format,
    )


def place_declarations(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    response_format: Mapping[str, Any] | None,
) -> list[Message]:
    """Put the tools and the response format of a request on its first system message.

    An empty system message is inserted only if there is none; always inserting one puts the tools
    in front of the system text, which the model never saw.
    """
    if not tools and response_format is None:
        return list(messages)
    first = messages[0] if messages else None
    if not isinstance(first, SystemMessage):
        return [SystemMessage("", tuple(tools), response_format), *messages]
    if first.response_format and response_format:
        raise InvalidConversationError(
            "response_format is given both for the conversation and on its system message"
        )
    if first.tools and tools and tuple(tools) != first.tools:
        raise InvalidConversationError(
            "tools are given both for the conversation and on its system message, and they differ"
        )
    declared = SystemMessage(
        first.content, tuple(tools) or first.tools, response_format or first.response_format
    )
    return [declared, *messages[1:]]


def calls_tools(messages: Iterable[Message]) -> bool:
    """Whether tools were used: reasoning is then kept, as if they were still declared.

    The reference looks at declarations only, so that a history of calls in a request without
    `tools` loses its reasoning at every tool result.
    """
    return any(
        isinstance(m, ToolMessage) or (isinstance(m, AssistantMessage) and m.tool_calls)
        for m in messages
    )


def to_reference(message: Message, generation: Generation) -> Dict:
    """One message in the reference's keys, every value of the type that the reference expects."""
    match message:
        case SystemMessage() | DeveloperMessage():
            out: Dict = {"role": message.role, "content": _text(message.content)}
            if message.tools:
                out["tools"] = [
                    {"type": "function", "function": dict(t.function)} for t in message.tools
                ]
            if message.response_format:
                out["response_format"] = dict(message.response_format)
            if isinstance(message, DeveloperMessage) and message.task:
                out["task"] = message.task
            return out
        case UserMessage():
            out = {"role": "user", "content": _items(message.content, generation)}
            if message.task:
                out["task"] = message.task
            return out
        case ToolMessage():
            content = _items(message.content, generation)
            return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id or ""}
        case ReminderMessage():
            return {"role": message.role, "content": _text(message.content)}
        case AssistantMessage():
            return _assistant(message)


def _assistant(message: AssistantMessage) -> Dict:
    out: Dict = {"role": "assistant", "content": _text(message.content)}
    if message.reasoning_content is not None:
        out["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.prefix:
        out |= {"wo_eos": True, "prefix": True}
    if message.task:
        out["task"] = message.task
    return out


def _arguments(arguments: str) -> str:
    """Empty and null arguments are no arguments; what is not an object stays visible as it is."""
    text = arguments
    stripped = text.strip()
    if stripped in ("", "null"):
        return "{}"
    if not stripped.startswith("{"):
        # The publisher's own renderer does the same; the reference raises for valid JSON.
        logger.warning("tool call arguments in the history are not a JSON object")
        return json_text({"arguments": text})
    return text


def _text(content: Content) -> str:
    """Text of content; parts are joined by a blank line (the reference prints the list)."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        if not isinstance(part, TextPart):
            raise InvalidConversationError(
                f"only text can stand here, got {type(part).__name__}",
                hint="images have a place only in user and tool messages of V4.1",
            )
        texts.append(part.text)
    return "\n\n".join(texts)


def _items(content: Content, generation: Generation) -> str | tuple[str, ...]:
    """User or tool content as text, or as items if it holds something with a control token."""
    if isinstance(content, str):
        return content
    items: list[str] = []
    for i, part in enumerate(content):
        if i:
            items.append("\n\n")
        if isinstance(part, ExtractedUrl):
            items += [EXTRACTED_URL, part.url]
        elif isinstance(part, ImagePart):
            if not generation.has_system_token:
                raise InvalidConversationError(
                    f"images cannot be rendered: {generation.name} has no place for them",
                    hint="describe the image in words, or drop it",
                )
            items.append(IMAGE)
        else:
            items.append(part.text)
    return tuple(items)

"""The fields of a Chat Completions message in which clients send the reasoning back.

DeepSeek calls it `reasoning_content`, vLLM and OpenRouter `reasoning`, OpenRouter also sends
`reasoning_details`, LiteLLM `thinking_blocks`, and LiteLLM hides any of them under
`provider_specific_fields`. A server that knows one spelling loses the reasoning of all other
clients, so all are read, and all that are given must agree.

Ids, formats and signatures are not kept: nothing verifies them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from hadal.chat.wire import Reading, WireModel, kind_of, member, read_text, says_something
from hadal.errors import InvalidConversationError

__all__ = ["UNREADABLE_HINT", "read_reasoning"]

UNREADABLE_HINT: Final = "this model cannot read it: send the text of the reasoning, or nothing"
"""What to do about encrypted or redacted reasoning."""

_CARRIERS: Final = ("reasoning_content", "reasoning", "reasoning_details", "thinking_blocks")


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


_DETAILS: Final[dict[str, type[_ReasoningDetail]]] = dict.fromkeys(
    ("reasoning.text", "reasoning.summary", "reasoning.encrypted"), _ReasoningDetail
)


def read_reasoning(reading: Reading, fields: Mapping[str, Any], path: str) -> str | None:
    """Read the reasoning of an assistant message; None if no field speaks of it.

    A blank text beside another one is a placeholder that some proxies add, and loses.

    Raises:
        InvalidConversationError: A field does not have its shape, holds no readable text, or two
            fields differ.
    """
    given = list(_spellings(reading, fields, path))
    nested = fields.get("provider_specific_fields")
    if nested is not None:
        inner = f"{path}.provider_specific_fields"
        given += _spellings(reading, nested, inner)
        for name, value in nested.items():
            if name not in _CARRIERS and says_something(value):
                reading.left_out(member(inner, name), "unknown field")
    if len(given) == 1:
        return given[0][1]
    texts = {text for _, text in given if text.strip()}
    if len(texts) > 1:
        spellings = ", ".join(where for where, _ in given)
        raise InvalidConversationError(f"these differ: {spellings}", where=given[0][0])
    return texts.pop() if texts else (given[0][1] if given else None)


def _spellings(reading: Reading, fields: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for name in _CARRIERS:
        value = fields.get(name)
        if value is None or value == []:
            continue
        where = f"{path}.{name}"
        if name == "reasoning_details":
            yield where, read_text(_details(reading, value, where), where)
        elif name == "thinking_blocks":
            yield where, read_text(_blocks(reading, value, where), where)
        else:
            yield where, read_text(value, where)


def _details(reading: Reading, value: Any, path: str) -> str:
    details = [
        reading.tagged(item, f"{path}[{i}]", _DETAILS) for i, item in enumerate(_list(value, path))
    ]
    texts = [d.text for d in details if d.text is not None]
    # A summary is not what was thought: it only counts where there is nothing else.
    texts = texts or [d.summary for d in details if d.summary is not None]
    if not texts:
        raise InvalidConversationError("no text among them", where=path, hint=UNREADABLE_HINT)
    return "".join(texts)


def _blocks(reading: Reading, value: Any, path: str) -> str:
    refused = {"redacted_thinking": UNREADABLE_HINT}
    models = {"thinking": _ThinkingBlock}
    return "".join(
        reading.tagged(item, f"{path}[{i}]", models, refused).thinking
        for i, item in enumerate(_list(value, path))
    )


def _list(value: Any, path: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidConversationError(f"expected a list, got {kind_of(value)}", where=path)
    return value

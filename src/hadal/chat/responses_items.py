"""Input items of OpenAI's Responses shape, and how they fold into messages.

One turn of the model is several items here: a reasoning item, a message, calls. Consecutive ones
fold into one `AssistantMessage`. A result is put behind the turn that holds its call, wherever it
stands in the list, because pairing goes by `call_id`. Where calls and results alternate, the items
do not say whether the calls were made in parallel. A call behind a result then joins the turn
before it only if that turn began with a reasoning item: a thinking model begins every turn with
one, and there is none in between. Without reasoning, one call a turn is the usual shape, and is
assumed.

Ids, `status` and `logprobs` are ignored on purpose, `encrypted_content` where the text stands
beside it; alone it is read if it is ours (`sealed`). Requests and writing: `openai_responses`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from hadal.chat.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.reasoning_fields import UNREADABLE_HINT
from hadal.chat.sealed import is_sealed, unseal
from hadal.chat.wire import (
    Items,
    Reading,
    WireModel,
    arguments_text,
    join_texts,
    kind_of,
    read_text,
)
from hadal.errors import InvalidConversationError

__all__ = ["read_input"]

_TEXT_ONLY: Final = "only text is supported"
_REFUSED_PARTS: Final[dict[str, str]] = dict.fromkeys(
    ("input_image", "input_file", "input_audio", "refusal"), _TEXT_ONLY
)
_REFUSED_ITEMS: Final = {
    "item_reference": "nothing is stored under that id: send the item itself",
    "compaction": "send the messages themselves",
    "custom_tool_call": "only function tools are supported",
    "custom_tool_call_output": "only function tools are supported",
}
_PART_LOSSES: Final = {"annotations": "put what the model should see into the text"}


_ITEM_LOSSES: Final = {"phase": "remove it"}


class _Message(WireModel):
    role: Literal["user", "assistant", "system", "developer"]
    content: Any
    type: str = "message"
    id: str | None = None
    status: str | None = None


class _Call(WireModel):
    type: str
    call_id: str
    name: str
    arguments: Any = None
    id: str | None = None
    status: str | None = None


class _Result(WireModel):
    type: str
    call_id: str
    output: Any
    id: str | None = None
    status: str | None = None


class _Reasoning(WireModel):
    type: str
    summary: Items | None = None
    content: Items | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class _Text(WireModel):
    type: str
    text: str
    logprobs: Any = None


_ITEMS: Final[dict[str, type[WireModel]]] = {
    "message": _Message,
    "reasoning": _Reasoning,
    "function_call": _Call,
    "function_call_output": _Result,
}


@dataclass(slots=True)
class _Turn:
    """One turn of the model while its items come in, and the results of its calls."""

    thoughts: list[str] = field(default_factory=list[str])
    texts: list[str] = field(default_factory=list[str])
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    results: list[ToolMessage] = field(default_factory=list[ToolMessage])
    began_with_reasoning: bool = False

    def messages(self) -> list[Message]:
        """The turn and then its results."""
        # Blanks among several items are placeholders.
        thoughts = [t for t in self.thoughts if t.strip()] or self.thoughts[:1]
        reasoning = "\n\n".join(thoughts) if thoughts else None
        message = AssistantMessage(join_texts(self.texts), reasoning, tuple(self.calls))
        return [message, *self.results]


class _Fold:
    """Folds items into messages.

    Attributes:
        timeline: Turns of the model and messages of others, in order.
    """

    def __init__(self, *, history_elsewhere: bool) -> None:
        self.timeline: list[Message | _Turn] = []
        self._history_elsewhere = history_elsewhere
        self._unanswered: defaultdict[str, list[_Turn]] = defaultdict(list)

    def messages(self) -> list[Message]:
        """Everything that came in."""
        return [
            message
            for entry in self.timeline
            for message in (entry.messages() if isinstance(entry, _Turn) else [entry])
        ]

    def turn(self, *, joins_after_results: bool = False) -> _Turn:
        """The turn that the next item of the model belongs to."""
        last = self.timeline[-1] if self.timeline else None
        if isinstance(last, _Turn) and (
            not last.results or (joins_after_results and last.began_with_reasoning)
        ):
            return last
        turn = _Turn()
        self.timeline.append(turn)
        return turn

    def call(self, call: ToolCall, path: str) -> None:
        """Add a call."""
        assert call.id is not None
        turn = self.turn(joins_after_results=True)
        if any(other.id == call.id for other in turn.calls):
            if not turn.results:
                raise InvalidConversationError(
                    "a call before it in the same turn has the same id", where=f"{path}.call_id"
                )
            turn = _Turn()  # some servers count from call_0 in each turn
            self.timeline.append(turn)
        turn.calls.append(call)
        self._unanswered[call.id].append(turn)

    def result(self, result: ToolMessage, path: str) -> None:
        """Put a result behind the latest turn whose call it can answer."""
        assert result.tool_call_id is not None
        if turns := self._unanswered.get(result.tool_call_id):
            turns.pop().results.append(result)
        elif self._history_elsewhere and turns is None:
            self.timeline.append(result)
        else:
            reason = "no call before it has this id" if turns is None else "it has a result already"
            raise InvalidConversationError(reason, where=f"{path}.call_id")


def read_input(reading: Reading, value: Any, *, history_elsewhere: bool) -> list[Message]:
    """Read the input of a request; the faults of single items are kept in `reading`.

    Args:
        reading: Where faults gather.
        value: Text, a list of items, or None.
        history_elsewhere: Earlier turns are on the server, so a result may have its call there.

    Raises:
        InvalidConversationError: Neither text nor a list.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [UserMessage(read_text(value, "input"))]
    if not isinstance(value, list | tuple):
        raise InvalidConversationError(
            f"expected a string or a list of items, got {kind_of(value)}", where="input"
        )
    fold = _Fold(history_elsewhere=history_elsewhere)
    for _ in reading.each(value, "input", lambda item, path: _item(reading, fold, item, path)):
        pass
    return fold.messages()


def _item(reading: Reading, fold: _Fold, raw: Any, path: str) -> None:
    if isinstance(raw, Mapping) and raw.get("type") is None and "role" in raw:
        raw = {**raw, "type": "message"}
    item = reading.tagged(raw, path, _ITEMS, _REFUSED_ITEMS, losses=_ITEM_LOSSES)
    match item:
        case _Message():
            _message(reading, fold, item, path)
        case _Reasoning():
            text = _reasoning_text(reading, item, path)
            turn = fold.turn()
            # Reasoning behind a call or an answer does not make the calls before it parallel.
            turn.began_with_reasoning |= not (turn.calls or turn.texts)
            turn.thoughts += [] if text is None else [text]
        case _Call():
            arguments = arguments_text(item.arguments, f"{path}.arguments")
            name = read_text(item.name, f"{path}.name")
            fold.call(ToolCall(name, arguments, item.call_id), path)
        case _:
            assert isinstance(item, _Result)
            output = join_texts(_texts(reading, item.output, f"{path}.output"))
            fold.result(ToolMessage(output, item.call_id), path)


def _message(reading: Reading, fold: _Fold, item: _Message, path: str) -> None:
    texts = _texts(reading, item.content, f"{path}.content")
    if item.role == "assistant":
        fold.turn().texts.extend(texts)
    elif item.role == "user":
        fold.timeline.append(UserMessage(join_texts(texts)))
    else:
        fold.timeline.append(SystemMessage(join_texts(texts)))


def _texts(reading: Reading, value: Any, path: str) -> list[str]:
    if isinstance(value, str):
        return [read_text(value, path)]
    if not isinstance(value, list | tuple):
        raise InvalidConversationError(
            f"expected a string or a list of parts, got {kind_of(value)}", where=path
        )
    return _tagged_texts(reading, value, path, ("input_text", "output_text", "text"))


def _tagged_texts(
    reading: Reading, values: Sequence[Any], path: str, kinds: Sequence[str]
) -> list[str]:
    models = dict.fromkeys(kinds, _Text)
    texts: list[str] = []
    for place, value in enumerate(values):
        where = f"{path}[{place}]"
        part = reading.tagged(value, where, models, _REFUSED_PARTS, losses=_PART_LOSSES)
        texts.append(read_text(part.text, f"{where}.text"))
    return texts


def _reasoning_text(reading: Reading, item: _Reasoning, path: str) -> str | None:
    if item.content:
        kinds = ("reasoning_text", "text")
        return "".join(_tagged_texts(reading, item.content, f"{path}.content", kinds))
    if item.summary and not is_sealed(item.encrypted_content):
        summary = _tagged_texts(reading, item.summary, f"{path}.summary", ("summary_text",))
        return "\n\n".join(summary)
    if is_sealed(item.encrypted_content):
        assert item.encrypted_content is not None
        return unseal(item.encrypted_content, f"{path}.encrypted_content")
    if item.encrypted_content:
        raise InvalidConversationError(
            "no text beside it", where=f"{path}.encrypted_content", hint=UNREADABLE_HINT
        )
    return None

"""What the three API shapes share: reading JSON from outside, and saying exactly what is wrong.

Pydantic models live only here and in the three API modules; what leaves them is frozen dataclasses.
A `Reading` collects every fault of one request, so that a client sees all of them at once, each with
its path. Two kinds are told apart. A fault is always an error. A field that is left out (nobody
knows it, or the message format has no place for it) is an error or a logged warning, as the
caller's policy says. No value is ever quoted: requests hold secrets, and logs are kept.

Mode, effort and tool choice: `controls`. The fields of each API: `openai_chat`, `openai_responses`, `anthropic`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from hadal.chat.messages import Content, Message, TextPart, Tool
from hadal.errors import InvalidConversationError

__all__ = [
    "Items",
    "Reading",
    "UnknownPolicy",
    "WireModel",
    "arguments_text",
    "join_texts",
    "kind_of",
    "member",
    "parts_of",
    "read_body",
    "read_text",
    "read_tool",
    "refuse_loss",
    "says_something",
    "shown",
    "take_options",
]

Items = Annotated[list[Any], Strict(False)]
"""A list whose items are read one by one; tuples too, since messages may come from Python."""

UnknownPolicy = Literal["error", "warn"]
"""What becomes of a field that has to be left out: the request is refused, or a warning logged."""

logger = logging.getLogger(__name__)

_LISTED_MAX: Final = 20
"""Faults spelled out in one message; the rest is counted, since a body may hold a million."""
_KEY_LEN_MAX: Final = 64
_TEXTS: Final = {"extra_forbidden": "is not a known field"}
"""Our words for pydantic's kinds of faults, where its own would puzzle."""
_NOTHING: Final[Mapping[str, str]] = {}

ModelT = TypeVar("ModelT", bound="WireModel")
T = TypeVar("T")


class WireModel(BaseModel):
    """A JSON object from outside. Unknown fields are kept, so that they can be reported."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _Fault(NamedTuple):
    path: str
    text: str
    hint: str | None = None


class Reading:
    """The faults and left-out fields of one request.

    Attributes:
        images: Whether images become `ImagePart` instead of a fault.
    """

    def __init__(self, unknown: UnknownPolicy, *, images: bool = False) -> None:
        if unknown not in ("error", "warn"):
            raise ValueError(f"unknown: expected 'error' or 'warn', got {unknown!r}")
        self.images = images
        self._unknown: UnknownPolicy = unknown
        self._faults: list[_Fault] = []
        self._left_out: list[_Fault] = []

    def check(self, model: type[ModelT], value: Any, path: str) -> ModelT:
        """Validate one object; its unknown fields are for `note_extra`.

        Raises:
            InvalidConversationError: It does not have the shape; all faults are listed.
        """
        if not isinstance(value, dict) and isinstance(value, Mapping):
            value = dict(value)
        try:
            return model.__pydantic_validator__.validate_python(value)
        except ValidationError as err:
            if not isinstance(value, Mapping):
                raise InvalidConversationError(
                    f"expected an object, got {kind_of(value)}", where=path
                ) from None
            details = err.errors(include_url=False, include_context=False, include_input=False)
            # `from None`: pydantic's own text quotes the input.
            faults = [
                _Fault(_join(path, e["loc"]), _TEXTS.get(e["type"], e["msg"])) for e in details
            ]
            raise _error_of(faults) from None

    def tagged(
        self,
        value: Any,
        path: str,
        models: Mapping[str, type[ModelT]],
        refused: Mapping[str, str] = _NOTHING,
        *,
        losses: Mapping[str, str] = _NOTHING,
    ) -> ModelT:
        """Validate an object by its `type`, and note its unknown fields (see `note_extra`).

        Raises:
            InvalidConversationError: No such type, a type in `refused` (its text is the hint), or
                the object does not have the shape.
        """
        if not isinstance(value, Mapping):
            raise InvalidConversationError(f"expected an object, got {kind_of(value)}", where=path)
        kind = value.get("type")
        model = models.get(kind) if isinstance(kind, str) else None
        if model is None:
            expected = ", ".join(repr(name) for name in models)
            named = shown(kind) if isinstance(kind, str) else kind_of(kind)
            hint = refused.get(kind) if isinstance(kind, str) else None
            raise InvalidConversationError(
                f"type {named} is not supported: expected one of {expected}", where=path, hint=hint
            )
        found = self.check(model, value, path)
        if found.__pydantic_extra__:
            self.note_extra(found, path, losses=losses)
        return found

    def note_extra(
        self,
        model: WireModel,
        path: str,
        *,
        faults: Mapping[str, str] = _NOTHING,
        losses: Mapping[str, str] = _NOTHING,
    ) -> None:
        """Note the fields of an object that its model does not declare.

        Args:
            model: The object.
            path: Where it is.
            faults: Known fields that are wrong here if they have a value, and the hint for each.
            losses: Known fields that are left out, and the hint for each. Both kinds say nothing
                where they are null, false or empty, as many clients write every field out.

        Raises:
            InvalidConversationError: A field of `faults` has a value.
        """
        for name, value in (model.__pydantic_extra__ or {}).items():
            where = member(path, name)
            if name in faults:
                if says_something(value):
                    raise InvalidConversationError(
                        "is not supported here", where=where, hint=faults[name]
                    )
            elif name in losses:
                if says_something(value):
                    self.left_out(where, "has no place in the message format", losses[name])
            else:
                self.left_out(where, "unknown field")

    def left_out(self, path: str, text: str, hint: str | None = None) -> None:
        """Note a field whose value ends up nowhere; `settle` treats it as the policy says."""
        self._left_out.append(_Fault(path, text, hint))

    def each(self, items: Iterable[Any], path: str, read: Callable[[Any, str], T]) -> Iterator[T]:
        """Read a list item by item; the faults of one do not hide those of the next."""
        for place, item in enumerate(items):
            try:
                yield read(item, f"{path}[{place}]")
            except InvalidConversationError as err:
                self.refuse(err)

    def refuse(self, err: InvalidConversationError) -> None:
        """Keep an error for `settle`."""
        self._faults.append(_Fault(err.where, err.message.removeprefix(f"{err.where}: "), err.hint))

    def settle(self, read: Callable[[], T]) -> T:
        """Return what `read` returns, if the whole request is in order.

        Raises:
            InvalidConversationError: `read` raised it, or there were faults, or fields left out
                that the policy refuses; all are listed.
        """
        try:
            value = read()
        except InvalidConversationError as err:
            self.refuse(err)
            raise _error_of(self._refused()) from None
        if refused := self._refused():
            raise _error_of(refused)
        for path, text, _ in self._left_out[:_LISTED_MAX]:
            logger.warning("field left out: %s: %s", path, text, extra={"field_path": path})
        if len(self._left_out) > _LISTED_MAX:
            logger.warning("fields left out: %d more", len(self._left_out) - _LISTED_MAX)
        return value

    def _refused(self) -> list[_Fault]:
        if self._unknown == "warn":
            return self._faults
        hint = "remove it, or read with unknown='warn' to go on without it"
        return [*self._faults, *(f._replace(hint=f.hint or hint) for f in self._left_out)]


def read_body(body: Mapping[str, Any] | bytes | str) -> Mapping[str, Any]:
    """Parse the JSON object of a request; a mapping is taken as it is.

    Raises:
        InvalidConversationError: Not JSON, or not an object.
    """
    value: Any = body
    if isinstance(body, bytes | str):
        try:
            value = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as err:
            # A decoding error quotes bytes of the body; a JSON error says only where.
            reason = "invalid UTF-8" if isinstance(err, UnicodeError) else str(err)
            raise InvalidConversationError(f"the body is not JSON: {reason}") from None
    if not isinstance(value, Mapping):
        raise InvalidConversationError(f"the body is no JSON object: got {kind_of(value)}")
    return value


def read_text(value: Any, path: str) -> str:
    """Check that a value is text.

    Raises:
        InvalidConversationError: Not a string, or half of a surrogate pair, which no tokenizer
            takes: some clients cut a string in the middle of an emoji.
    """
    if not isinstance(value, str):
        raise InvalidConversationError(f"expected a string, got {kind_of(value)}", where=path)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as err:
            raise InvalidConversationError(
                f"half of a surrogate pair at character {err.start}",
                where=path,
                hint="cut text between characters, not within one",
            ) from None
    return value


def arguments_text(value: Any, path: str) -> str:
    """Return the arguments of a call as JSON text; null and "" mean no parameters.

    Clients send text, an object, null or nothing; the published encoder nests all but the first
    under a parameter called `arguments`, and the model imitates that.

    Raises:
        InvalidConversationError: Neither text nor a JSON object.
    """
    if value is None or value == "":
        return "{}"
    if isinstance(value, str):
        return read_text(value, path)
    if isinstance(value, Mapping):
        try:
            return read_text(json.dumps(value, ensure_ascii=False), path)
        except (TypeError, ValueError, RecursionError) as err:
            if isinstance(err, InvalidConversationError):
                raise
            raise InvalidConversationError("is not a JSON object", where=path) from None
    raise InvalidConversationError(
        f"expected JSON text or an object, got {kind_of(value)}", where=path
    )


def read_tool(function: Mapping[str, Any], path: str) -> Tool:
    """Make a tool of a function object; the model sees the whole of it as JSON.

    Raises:
        InvalidConversationError: It has no name, or cannot be written as JSON text.
    """
    if not read_text(function.get("name"), f"{path}.name"):
        raise InvalidConversationError("is empty", where=f"{path}.name")
    try:
        text = json.dumps(function, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise InvalidConversationError("is not a JSON object", where=path) from None
    read_text(text, path)
    return Tool(function)


def take_options(
    reading: Reading, found: WireModel, options: Set[str], faults: Mapping[str, str] = _NOTHING
) -> dict[str, Any]:
    """Take the fields that go untouched into `Conversation.options`; note the other unknown ones.

    Raises:
        InvalidConversationError: A field of `faults` has a value.
    """
    extra = found.__pydantic_extra__ or {}
    taken = {name: v for name, v in extra.items() if name in options and v is not None}
    rest = {name: v for name, v in extra.items() if name not in options}
    reading.note_extra(WireModel.model_validate(rest), "", faults=faults)
    return taken


def join_texts(texts: Sequence[str]) -> Content:
    """Content of text blocks in the APIs that always send a list: one block is just its text."""
    if len(texts) == 1:
        return texts[0]
    return tuple(map(TextPart, texts)) if texts else ""


def parts_of(content: Content, where: str) -> list[str]:
    """Texts of a content, for an API that has only text blocks; "" is one empty text.

    Raises:
        InvalidConversationError: A part is not text.
    """
    if isinstance(content, str):
        return [content]
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if len(texts) != len(content):
        raise InvalidConversationError("a part is not text", where=where)
    return texts


def refuse_loss(message: Message, where: str, api: str, fields: Iterable[str]) -> None:
    """Refuse to write a message whose fields the API has no place for.

    Raises:
        InvalidConversationError: One of the fields has a value.
    """
    for name in fields:
        if says_something(getattr(message, name, None)) and getattr(message, name) != ():
            raise InvalidConversationError(
                f"the {api} API has no place for it", where=member(where, name)
            )


def says_something(value: Any) -> bool:
    """Whether a field has a value at all: clients write out null, false, "", [] and {}."""
    return value is not None and value is not False and value not in ("", [], {})


def member(path: str, name: object) -> str:
    """Path of a field within an object."""
    return f"{path}.{shown(name)}" if path else shown(name)


def _join(path: str, location: Iterable[str | int]) -> str:
    for step in location:
        path = f"{path}[{step}]" if isinstance(step, int) else member(path, step)
    return path


def shown(name: object) -> str:
    """A key from outside, short and on one line."""
    text = str(name)
    plain = text.isprintable() and 0 < len(text) <= _KEY_LEN_MAX
    return text if plain else ascii(text[:_KEY_LEN_MAX])


def kind_of(value: Any) -> str:
    """JSON name of a type; never the value."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _error_of(faults: Sequence[_Fault]) -> InvalidConversationError:
    texts = [f"{f.path}: {f.text}" for f in faults[1:_LISTED_MAX]]
    if len(faults) > _LISTED_MAX:
        texts.append(f"{len(faults) - _LISTED_MAX} more")
    hints = dict.fromkeys(f.hint for f in faults[:_LISTED_MAX] if f.hint)
    return InvalidConversationError(
        "; ".join([faults[0].text, *texts]),
        where=faults[0].path,
        hint="; ".join(hints) or None,
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

"""Are these arguments what the tool declared? If not, a text that tells the model.

A call from the parser is well formed; whether it fits its tool is another question, and asked only
if the caller wants it. Nothing is coerced: "42" is not an integer, and the text says how to write
one. No reference in a schema is ever fetched.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jsonschema import ValidationError
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from hadal.chat.messages import Tool, ToolCall
from hadal.errors import ConfigError, InvalidConversationError

__all__ = ["ArgumentError", "CallFault", "check_call"]

_SHOWN_ERRORS: Final = 8
_SHOWN_CHARACTERS: Final = 80
_EMPTY: Final[Registry[Any]] = Registry()


@dataclass(frozen=True, slots=True)
class ArgumentError:
    """One thing about the arguments that the schema refuses.

    Attributes:
        path: Where, as `filters[0].name`; "" for the whole.
        message: What was expected and what was found.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@dataclass(frozen=True, slots=True)
class CallFault:
    """Why a call cannot be run.

    Attributes:
        call: The call.
        errors: All that is wrong with it.
        message: For the model, as the result of the call.
    """

    call: ToolCall
    errors: tuple[ArgumentError, ...]
    message: str


def check_call(call: ToolCall, tools: Sequence[Tool]) -> CallFault | None:
    """Check a call against the declared tools.

    Returns:
        None if it can be run.

    Raises:
        ConfigError: The schema of the tool is itself broken, or refers to what is not in it.
    """
    tool = next((t for t in tools if t.name == call.name), None)
    if tool is None:
        return _unknown(call, [t.name for t in tools])
    try:
        arguments = call.parsed()
        errors = _errors(tool, arguments)
    except (InvalidConversationError, RecursionError) as err:
        text = "they are nested too deeply" if isinstance(err, RecursionError) else str(err)
        errors = [ArgumentError("", text)]
    if not errors:
        return None
    lines = [f"The call of {call.name} was not run: its arguments do not fit."]
    lines += [f"- {error}" for error in errors[:_SHOWN_ERRORS]]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"- and {len(errors) - _SHOWN_ERRORS} more")
    return CallFault(call, tuple(errors), "\n".join(lines))


def _unknown(call: ToolCall, names: list[str]) -> CallFault:
    close = difflib.get_close_matches(call.name, names, n=len(names) or 1, cutoff=0.0)
    known = ", ".join(close) if close else "none"
    text = f"there is no tool {_shown(call.name)}; the tools are: {known}"
    return CallFault(call, (ArgumentError("", text),), f"The call was not run: {text}.")


def _errors(tool: Tool, arguments: dict[str, Any]) -> list[ArgumentError]:
    if not tool.parameters:
        return []
    validator = _validator(tool)
    try:
        found = sorted(validator.iter_errors(arguments), key=lambda e: list(map(str, e.path)))
    except Unresolvable as err:
        raise ConfigError(
            f"the schema of tool {tool.name!r} refers to {err.ref!r}, which is not in it",
            hint="nothing is fetched: put what is referred to under $defs",
        ) from err
    return [_described(error) for error in found]


def _validator(tool: Tool) -> Validator:
    schema: Any = dict(tool.parameters)
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as err:
        raise ConfigError(
            f"the parameters of tool {tool.name!r} are not a JSON Schema: {err.message[:200]}"
        ) from err
    return kind(schema, registry=_EMPTY)


def _described(error: ValidationError) -> ArgumentError:
    path = ""
    for step in error.absolute_path:
        path += f"[{step}]" if isinstance(step, int) else f"{'.' if path else ''}{step}"
    value: Any = error.instance
    rule: Any = error.validator_value
    schema: Any = error.schema
    match error.validator:
        case "type":
            wanted = rule if isinstance(rule, str) else " or ".join(rule)
            hint = ""
            if isinstance(value, str) and wanted != "string":
                hint = ' (write it with string="false")'
            elif wanted == "string":
                hint = ' (write it with string="true")'
            text = f"expected {wanted}, got {_kind(value)} {_shown(value)}{hint}"
        case "required":
            missing = [name for name in rule if name not in value]
            text = f"missing: {', '.join(missing)}"
        case "enum":
            options = ", ".join(_shown(option) for option in rule[:20])
            text = f"expected one of {options}, got {_shown(value)}"
        case "additionalProperties" if isinstance(value, Mapping):
            known = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
            extra = [str(k) for k in value if k not in known]
            text = f"unknown: {', '.join(map(_shown, extra))}; known: {', '.join(known)}"
        case _:
            text = f"{error.validator} {_shown(rule)} does not hold for {_shown(value)}"
    return ArgumentError(path, text)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"

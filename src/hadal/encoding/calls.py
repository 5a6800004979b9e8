"""One call while it is being read: its parameters become the JSON text of an object, piece by piece.

The text is the reference's: keys and strings JSON-escaped with non-ASCII raw, other values pasted
as the model spelled them, so that number spelling survives.
"""

import json
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any, cast

from hadal.chat.messages import Tool, ToolCall

__all__ = ["OpenCall", "escape", "json_fault"]

_WRAPPERS = ("arguments", "input")


def escape(text: str) -> str:
    """The inside of a JSON string."""
    return encode_basestring(text)[1:-1]


def json_fault(text: str) -> str | None:
    """Why this is not JSON, or None if it is. NaN and Infinity are not."""
    try:
        json.loads(text, parse_constant=_refuse, parse_int=str, parse_float=str)
    except ValueError as err:
        return str(err)
    except RecursionError:
        return "nested too deeply"
    return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class OpenCall:
    """A call that has begun.

    Attributes:
        deferred: Nothing is handed out yet, because the only parameter may turn out to be a
            wrapper around the real arguments.
    """

    def __init__(self, index: int, call_id: str, name: str, tool: Tool | None) -> None:
        self.index = index
        self.id = call_id
        self.name = name
        self.tool = tool
        self.keys: set[str] = set()
        self.deferred = False
        self._pieces: list[str] = []  # JSON text of the arguments, without the closing brace
        self._complete = 0  # pieces that belong to complete parameters
        self._value: list[str] = []  # of the parameter being read, as the model wrote it
        self.is_string = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """Declared parameters; empty if the tool or its schema is not known."""
        found = self.tool.parameters.get("properties") if self.tool else None
        return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}

    def knows(self, key: str) -> bool:
        """Whether this may be a parameter, as far as the declaration tells."""
        return not self.properties or key in self.properties

    def lacks_required(self) -> list[str]:
        """Required parameters that have not come."""
        required = self.tool.parameters.get("required") if self.tool else None
        names = cast("list[Any]", required) if isinstance(required, list) else []
        return [name for name in names if name not in self.keys]

    def open_parameter(self, key: str, *, is_string: bool) -> str:
        """Begin a parameter; returns the text that this adds."""
        self.deferred = (
            not self.keys and key in _WRAPPERS and bool(self.properties) and not self.knows(key)
        )
        separator = ", " if self.keys else "{"
        self.keys.add(key)
        self.is_string = is_string
        self._value.clear()
        return self._add(f'{separator}"{escape(key)}": {chr(34) if is_string else ""}')

    def add_value(self, text: str) -> str:
        """More of the value; returns the text that this adds."""
        if not self.is_string:
            self._value.append(text)
            return self._add(text)
        if self.deferred:
            self._value.append(text)
        return self._add(escape(text))

    def close_parameter(self) -> tuple[str, str | None]:
        """End a parameter: the text that this adds, and why its value is no JSON, if so."""
        fault = None if self.is_string else json_fault("".join(self._value))
        added = self._add('"') if self.is_string else ""
        if fault is None:
            self._complete = len(self._pieces)
        return added, fault

    def undefer(self) -> str:
        """The parameter is no wrapper: the text that was kept back."""
        self.deferred = False
        return "".join(self._pieces)

    def unwrap(self) -> bool:
        """Take the real arguments out of a wrapper, if their keys fit the declaration."""
        inner = "".join(self._value).strip()
        try:
            value = json.loads(inner) if json_fault(inner) is None else None
        except ValueError:  # a number too long for Python
            return False
        if not isinstance(value, dict) or not all(key in self.properties for key in value):
            return False
        self._pieces = [inner[:-1]]
        self.keys = set(value)
        self._complete = 1
        return True

    def close(self) -> str:
        """End the call; returns the text that this adds."""
        return self._add("}" if self._pieces else "{}")

    def finished(self) -> ToolCall:
        """The call, after `close`."""
        return ToolCall(self.name, "".join(self._pieces), self.id)

    def salvaged(self) -> str:
        """JSON text of the parameters that were complete."""
        return "".join(self._pieces[: self._complete]) + "}" if self._complete else "{}"

    def _add(self, text: str) -> str:
        self._pieces.append(text)
        return text

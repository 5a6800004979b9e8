"""DSML, the markup of tool calls: writing it.

    block = "<｜DSML｜tool_calls>" LF invoke *(LF invoke) LF "</｜DSML｜tool_calls>"
    invoke = '<｜DSML｜invoke name="' NAME '">' LF [param *(LF param)] LF "</｜DSML｜invoke>"
    param = '<｜DSML｜parameter name="' KEY '" string="' ("true" / "false") '">' VALUE
            "</｜DSML｜parameter>"

Nothing is escaped. A string goes in as it is, with string="true"; every other value as JSON, with
string="false". Reading it is `parser`'s work.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from hadal.encoding.tags import Tags
from hadal.encoding.tokens import split_trusted
from hadal.errors import InvalidConversationError

__all__ = ["CallWriter", "Parameter", "json_text", "parameters_of"]


class Parameter(NamedTuple):
    """One argument as the markup writes it."""

    key: str
    text: str
    is_string: bool


def json_text(value: object) -> str:
    """JSON in the reference's spelling: `, ` and `: `, non-ASCII raw, Python's numbers."""
    return json.dumps(value, ensure_ascii=False)


def parameters_of(arguments: object, *, object_required: bool) -> list[Parameter]:
    """Split the arguments of a call into parameters, as the reference does.

    Anything but a JSON text becomes one parameter named `arguments` that holds it: the nesting
    which the model then imitates. The default face never lets that happen for an object or null.

    Args:
        arguments: Normally the JSON text of an object.
        object_required: Refuse everything else (V4.1).

    Raises:
        InvalidConversationError: JSON, but not of an object.
    """
    fallback: dict[str, Any] = {"arguments": arguments}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str | bytes) else fallback
    except (ValueError, RecursionError):
        parsed = fallback
    if not isinstance(parsed, dict) or (object_required and parsed is fallback):
        raise InvalidConversationError(
            "arguments of a tool call: expected the JSON text of an object, "
            f"got {str(arguments)[:80]!r}"
        )
    return [
        Parameter(key, value, True)
        if isinstance(value, str)
        else Parameter(key, json_text(value), False)
        for key, value in parsed.items()
    ]


class CallWriter:
    """Writes blocks of calls with the tags of one generation, as items for the tokenizer."""

    def __init__(self, tags: Tags) -> None:
        self._block_open = split_trusted(f"\n\n{tags.block_open}\n")
        self._block_close = split_trusted(f"\n{tags.block_close}")
        self._invoke_open = split_trusted(tags.invoke_open_prefix)
        self._invoke_close = split_trusted(f"\n{tags.invoke_close}")
        self._parameter_open = split_trusted(tags.parameter_open_prefix)
        self._parameter_close = split_trusted(tags.parameter_close)

    def open_block(self, out: list[str]) -> None:
        """Write the opening of a block, which the model then has to go on with."""
        out += self._block_open

    def write_block(self, out: list[str], calls: Sequence[tuple[str, list[Parameter]]]) -> None:
        """Write the blank line and the block of these calls."""
        out += self._block_open
        for i, (name, parameters) in enumerate(calls):
            if i:
                out.append("\n")
            out += [*self._invoke_open, name, '">\n']
            for j, (key, text, is_string) in enumerate(parameters):
                if j:
                    out.append("\n")
                out += self._parameter_open
                out += [key, '" string="true">' if is_string else '" string="false">', text]
                out += self._parameter_close
            out += self._invoke_close
        out += self._block_close

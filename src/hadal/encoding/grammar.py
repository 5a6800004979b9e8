"""The grammar of calls for given tools, so that an engine can make malformed calls impossible.

The language is the published markup exactly: one line feed between tags, an empty line for a call
without parameters, `string="true"` for strings and JSON for everything else. It says nothing about
the text before the block: constrain from the wrapper's opening tag on, and not before the reasoning
has ended. Written in the EBNF dialect of xgrammar and llama.cpp (GBNF).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from hadal.chat.messages import Tool
from hadal.encoding.tags import DSML, Tags
from hadal.errors import InvalidConversationError

__all__ = ["EXACT_PARAMETERS", "Grammar", "write_grammar"]

EXACT_PARAMETERS: Final = 6
"""Up to this many parameters, duplicates are excluded and required ones enforced in any order.

That takes 2^n rules. Beyond it, any declared parameter may follow any other.
"""

_REF_DEPTH: Final = 8
_JSON: Final = r"""
json_other ::= object | array | number | "true" | "false" | "null"
json_any ::= json_string | json_other
object ::= "{" ws ( json_string ws ":" ws json_any ( ws "," ws json_string ws ":" ws json_any )* ws )? "}"
array ::= "[" ws ( json_any ( ws "," ws json_any )* ws )? "]"
integer ::= "-"? ( "0" | [1-9] [0-9]* )
number ::= integer ( "." [0-9]+ )? ( [eE] [+-]? [0-9]+ )?
boolean ::= "true" | "false"
null ::= "null"
ws ::= [ \t\n\r]*
escape ::= "\\" ( ["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] )
json_string ::= "\"" json_chars_0
"""
_RULES_OF_TYPES: Final = {
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "object",
    "array": "array",
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a block of calls may be.

    Attributes:
        ebnf: From the opening tag of the wrapper through its closing tag; the root rule is `root`.
        structural_tag: For xgrammar: free text up to the wrapper's opening tag, then the block.
    """

    ebnf: str
    structural_tag: dict[str, Any]


def write_grammar(
    tools: Sequence[Tool], tags: Tags, *, required: bool = False, parallel: bool = True
) -> Grammar:
    """Write the grammar of the calls of these tools.

    Args:
        tools: At least one, with different names.
        tags: Of the generation.
        required: The structural tag demands a block.
        parallel: Allow more than one call.

    Raises:
        InvalidConversationError: No tools, two of one name, or a name that the markup cannot hold.
    """
    if not tools:
        raise InvalidConversationError("a grammar of calls needs at least one tool, got none")
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidConversationError("two tools have the same name")
    for name in names:
        _check_name(name, "tool")
    rules = [*_value_rules(tags.parameter_close), _JSON.strip()]
    for i, tool in enumerate(tools):
        rules += _tool_rules(i, tool, tags)
    rules.append(f"invoke ::= {' | '.join(f'tool_{i}' for i in range(len(tools)))}")
    more = ' ( "\\n" invoke )*' if parallel else ""
    inside = f'"\\n" invoke{more} "\\n"'
    whole = f"root ::= {_literal(tags.block_open)} {inside} {_literal(tags.block_close)}"
    content = "\n".join([f"root ::= {inside}", *rules])
    tag = {
        "begin": tags.block_open,
        "content": {"type": "grammar", "grammar": content},
        "end": tags.block_close,
    }
    structural_tag = {
        "type": "structural_tag",
        "format": {
            "type": "triggered_tags",
            "triggers": [tags.block_open],
            "tags": [tag],
            "at_least_one": required,
            "stop_after_first": True,
        },
    }
    return Grammar("\n".join([whole, *rules]) + "\n", structural_tag)


def _check_name(name: str, what: str) -> None:
    if '"' in name or "\n" in name or DSML in name:
        raise InvalidConversationError(
            f"the markup cannot hold this {what} name safely: {name[:80]!r}",
            hint="names have no escaping: leave out quotes and line feeds",
        )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _value_rules(end_tag: str) -> Iterator[str]:
    """Text, and the inside of JSON strings, that do not hold the end tag of a parameter.

    Rule k stands for "the last k characters were the first k of the tag". Only its first character
    is `<`, so that after a mismatch either one or none of them still counts.
    """
    for k, char in enumerate(end_tag):
        on = "" if k + 1 == len(end_tag) else f" | {_literal(char)} value_{k + 1}"
        restart = "" if k == 0 else ' | "<" value_1'
        others = "[^<]" if k == 0 else f"[^<{char}]"
        yield f'value_{k} ::= ""{on}{restart} | {others} value_0'
        on = "" if k + 1 == len(end_tag) else f" | {_literal(char)} json_chars_{k + 1}"
        restart = "" if k == 0 else ' | "<" json_chars_1'
        others = r'[^<"\\\x00-\x1f]' if k == 0 else rf'[^<"\\\x00-\x1f{char}]'
        yield (
            f'json_chars_{k} ::= "\\"" | escape json_chars_0{on}{restart} | {others} json_chars_0'
        )


def _tool_rules(i: int, tool: Tool, tags: Tags) -> Iterator[str]:
    schema = tool.parameters
    found = schema.get("properties")
    properties = cast("dict[str, Any]", found) if isinstance(found, Mapping) else {}
    needed = [key for key in schema.get("required") or () if key in properties]
    opening = _literal(f'{tags.invoke_open_prefix}{tool.name}">\n')
    closing = _literal(f"\n{tags.invoke_close}")
    for j, (key, value) in enumerate(properties.items()):
        _check_name(key, "parameter")
        yield f"tool_{i}_{j} ::= {_parameter(key, value, schema, tags)}"
    keys = list(properties)
    if not keys and schema.get("additionalProperties", True) is not False and schema:
        yield f"tool_{i}_any ::= {_any_parameter(tags)}"
        body = f'( tool_{i}_any ( "\\n" tool_{i}_any )* )?'
    elif not keys:
        body = '""'
    elif len(keys) <= EXACT_PARAMETERS:
        yield from _subsets(i, [key in needed for key in keys])
        body = f"tool_{i}_set_0"
    else:
        one = f"( {' | '.join(f'tool_{i}_{j}' for j in range(len(keys)))} )"
        body = f'( {one} ( "\\n" {one} )* ){"" if needed else "?"}'
    yield f"tool_{i} ::= {opening} {body} {closing}"


def _subsets(i: int, needed: Sequence[bool]) -> Iterator[str]:
    """One rule for each set of parameters that have come: what may follow it."""
    for given in range(1 << len(needed)):
        separator = '"\\n" ' if given else ""
        ways = [
            f"{separator}tool_{i}_{j} tool_{i}_set_{given | 1 << j}"
            for j in range(len(needed))
            if not given >> j & 1
        ]
        if all(given >> j & 1 for j, must in enumerate(needed) if must):
            ways.append('""')
        yield f"tool_{i}_set_{given} ::= {' | '.join(ways)}"


def _parameter(key: str, schema: Any, root: Mapping[str, Any], tags: Tags) -> str:
    opening = f'{tags.parameter_open_prefix}{key}" string="'
    ways: list[str] = []
    for is_string, rule in dict.fromkeys(_ways(schema, root, _REF_DEPTH)):
        flag = _literal(f'{opening}{"true" if is_string else "false"}">')
        ways.append(f"{flag} {rule}")
    return f"( {' | '.join(ways)} ) {_literal(tags.parameter_close)}"


def _any_parameter(tags: Tags) -> str:
    opening, flag = _literal(tags.parameter_open_prefix), _literal('" string="')
    value = '( "true\\">" value_0 | "false\\">" json_other )'
    return f'{opening} [^"\\n<]* {flag} {value} {_literal(tags.parameter_close)}'


def _ways(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[tuple[bool, str]]:
    """(is it written as a string, rule of its text) for each kind of value that may stand."""
    anything = [(True, "value_0"), (False, "json_other")]
    if not isinstance(schema, Mapping) or depth == 0:
        yield from anything
        return
    schema = cast("Mapping[str, Any]", schema)
    if "$ref" in schema:
        yield from _ways(_resolve(schema["$ref"], root), root, depth - 1)
        return
    if "const" in schema or "enum" in schema:
        for value in [schema["const"]] if "const" in schema else schema["enum"]:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield isinstance(value, str), _literal(text)
        return
    for union in ("anyOf", "oneOf"):
        if union in schema:
            for inner in schema[union]:
                yield from _ways(inner, root, depth - 1)
            return
    kinds = schema.get("type")
    known: list[str] = [kinds] if isinstance(kinds, str) else [str(k) for k in kinds or ()]
    if schema.get("nullable") is True:
        known.append("null")
    if not known:
        yield from anything
    for kind in known:
        yield (
            (True, "value_0")
            if kind == "string"
            else (
                False,
                _RULES_OF_TYPES.get(kind, "json_other"),
            )
        )


def _resolve(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a local `#/…` reference names; None, which means anything, if it names nothing here."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for step in reference[2:].split("/"):
        if not isinstance(found, Mapping):
            return None
        found = cast("Mapping[str, Any]", found).get(step.replace("~1", "/").replace("~0", "~"))
    return found

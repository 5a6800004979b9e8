"""Whether calls can be checked against the schema of a tool, asked before a model makes one."""

from typing import Any, cast

from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from hadal.chat import Tool, ToolCall
from hadal.encoding import check_call
from hadal.errors import ConfigError

__all__ = ["check_schema"]

_DATA = ("const", "default", "enum", "examples")
"""What a schema holds there is no schema."""


def check_schema(tool: Tool) -> None:
    """See that the schema of a tool is one and refers to nothing outside, wherever that stands in it.

    Raises:
        ConfigError: It is none, or refers to what is not in it.
    """
    if not tool.parameters:
        return
    check_call(ToolCall(tool.name, "{}"), [tool])
    schema = dict(tool.parameters)
    root: Resource[Any] = Resource.from_contents(schema, default_specification=DRAFT202012)
    empty: Registry[Any] = Registry()
    waiting: list[tuple[Any, Any]] = [(schema, empty.resolver_with_root(root))]
    try:
        while waiting:
            waiting += _below(*waiting.pop())
    except Unresolvable as error:
        raise ConfigError(
            f"the schema of tool {tool.name!r} refers to {error.ref!r}, which is not in it",
            hint="nothing is fetched: put what is referred to under $defs",
        ) from error


def _below(value: Any, resolver: Any) -> list[tuple[Any, Any]]:
    """Follow the reference of a part of a schema, and return its own parts."""
    if isinstance(value, list):
        return [(part, resolver) for part in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return []
    parts = cast("dict[str, Any]", value)
    if isinstance(parts.get("$id"), str):
        resolver = resolver.in_subresource(DRAFT202012.create_resource(parts))
    if isinstance(parts.get("$ref"), str):
        resolver.lookup(parts["$ref"])
    return [(part, resolver) for name, part in parts.items() if name not in _DATA]

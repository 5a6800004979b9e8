"""Tools of the caller's own: a Python function, its signature and its docstring."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError, create_model

from hadal.chat import Tool
from hadal.errors import ConfigError
from hadal.tools.tool import Said, ToolOutput, ToolUseError

__all__ = ["FunctionTool", "tool"]

Function = Callable[..., Any | Awaitable[Any]]


@dataclass(frozen=True)
class FunctionTool:
    """A function that a model may call. It runs here, outside of every box: do not trust its arguments.

    Attributes:
        function: Plain or async. What it raises is told to the model.
        declaration: Made of its name, docstring and annotations.
        arguments: What reads its arguments.
    """

    function: Function
    declaration: Tool
    arguments: type[BaseModel]

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Call it; see `RunningTool.call`."""
        try:
            read = self.arguments.model_validate(arguments)
            found = self.function(**{name: getattr(read, name) for name in arguments})
            if inspect.isawaitable(found):
                found = await found
        except ValidationError as error:
            raise ToolUseError(str(error)) from error
        except Exception as error:
            raise ToolUseError(f"{type(error).__name__}: {error}") from error
        return ToolOutput(
            text=found if isinstance(found, str) else TypeAdapter(Any).dump_json(found).decode()
        )


def tool(function: Function) -> FunctionTool:
    """Make a tool of a function; usable as a decorator.

    Raises:
        ConfigError: A parameter has no annotation, or there is no docstring.

    Example:
        >>> @tool
        ... def add(a: int, b: int) -> int:
        ...     "Add two numbers."
        ...     return a + b
        >>> add.declaration.name
        'add'
    """
    about = inspect.getdoc(function)
    name = function.__name__
    if not about:
        raise ConfigError(
            f"tool {name}: no docstring", hint="say in it what the tool does: the model reads it"
        )
    model = _arguments_model(function)
    schema = model.model_json_schema()
    for value in (schema, *schema.get("properties", {}).values()):
        value.pop("title", None)
    return FunctionTool(function, Tool.of(name, about, schema), model)


def _arguments_model(function: Function) -> type[BaseModel]:
    hints = get_type_hints(function)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(
                f"tool {function.__name__}: parameter {name} has no annotation, or is a list of them",
                hint="every parameter needs a name and a type",
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints[name], default)
    return create_model(function.__name__, **fields)

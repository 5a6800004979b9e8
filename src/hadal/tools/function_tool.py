"""Tools of the caller's own: a Python function, its signature and its docstring."""

import asyncio
import inspect
import json
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError, create_model

from hadal.chat import Tool
from hadal.errors import ConfigError
from hadal.tools.tool import Said, ToolOutput, ToolUseError, cause_of

__all__ = ["FunctionTool", "tool"]

Function = Callable[..., Any | Awaitable[Any]]


@dataclass(frozen=True)
class FunctionTool:
    """A function that a model may call. It runs here, outside of every box: do not trust its arguments.

    Attributes:
        function: Plain or async; a plain one runs in a thread. What it raises is told to the model.
        declaration: Made of its name, docstring and annotations.
        arguments: What reads its arguments.
        timeout_s: Of a call. Then an async function is cancelled, and nobody waits for a plain one any more.
    """

    function: Function
    declaration: Tool
    arguments: type[BaseModel]
    timeout_s: float = 300.0

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Call it; see `RunningTool.call`."""
        try:
            read = self.arguments.model_validate(arguments)
        except ValidationError as error:
            raise ToolUseError(str(error)) from error
        limit = asyncio.timeout(self.timeout_s)
        try:
            async with limit:
                found = await self._found({name: getattr(read, name) for name in arguments})
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                raise ToolUseError(f"it did not return within {self.timeout_s:g} s") from error
            raise ToolUseError(cause_of(error)) from error
        return ToolOutput(text=found if isinstance(found, str) else _as_json(found))

    async def _found(self, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**arguments)
        found = await _in_thread(lambda: self.function(**arguments))
        return await found if inspect.isawaitable(found) else found


def _in_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Do work in a thread that nobody waits for at the end, as one of `asyncio.to_thread` is waited for."""
    done: Future[Any] = Future()
    done.set_running_or_notify_cancel()
    context = copy_context()

    def run() -> None:
        try:
            done.set_result(context.run(work))
        except (StopIteration, SystemExit) as error:  # what neither a future nor a loop passes on
            done.set_exception(RuntimeError(cause_of(error)))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(done)


def _as_json(value: Any) -> str:
    """Return JSON; unlike pydantic's own bytes, text takes names of files that are no UTF-8."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def tool(function: Function, *, timeout_s: float = 300.0) -> FunctionTool:
    """Make a tool of a function; usable as a decorator.

    Args:
        function: Plain or async.
        timeout_s: Of a call.

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
    return FunctionTool(function, Tool.of(name, about, schema), model, timeout_s)


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

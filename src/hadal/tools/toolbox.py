"""All tools of an agent. Whatever the model calls, it gets an answer."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jsonschema import Draft202012Validator

from hadal.chat import Tool, ToolCall
from hadal.errors import ConfigError, InvalidConversationError
from hadal.tools.file_watch import FileWatch
from hadal.tools.tool import RunningTool, ToolOutput, ToolUseError

__all__ = ["Toolbox"]


class Toolbox:
    """Tools by name.

    Args:
        tools: With different names.
        watch: Looks at files after every call.

    Raises:
        ConfigError: Two have the same name.
    """

    def __init__(self, tools: Sequence[RunningTool], watch: FileWatch | None = None) -> None:
        self._watch = watch
        self._tools = {tool.declaration.name: tool for tool in tools}
        if len(self._tools) != len(tools):
            names = [tool.declaration.name for tool in tools]
            raise ConfigError(f"two tools have the same name: {', '.join(sorted(names))}")

    @property
    def declarations(self) -> tuple[Tool, ...]:
        """Return what the model is told of them."""
        return tuple(tool.declaration for tool in self._tools.values())

    async def call(self, call: ToolCall, request_id: str) -> ToolOutput:
        """Do what a model asks for.

        Args:
            call: As it was parsed.
            request_id: Twice the same does it once.

        Raises:
            SandboxError: The box or its node failed: that is not the model's fault.
        """
        try:
            tool = self._tools.get(call.name)
            if tool is None:
                names = ", ".join(sorted(self._tools))
                raise ToolUseError(f"there is no tool {call.name!r}; there are: {names}")
            arguments = _arguments(call)
            _check(arguments, tool.declaration)
            return await self._watched(tool, arguments, request_id)
        except ToolUseError as error:
            return ToolOutput(text=f"Error: {error}", failed=True)

    async def _watched(
        self, tool: RunningTool, arguments: dict[str, Any], request_id: str
    ) -> ToolOutput:
        if self._watch is None:
            return await tool.call(arguments, request_id)
        await self._watch.begin()
        output = await tool.call(arguments, request_id)
        return replace(output, files=await self._watch.look())


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        return call.parsed()
    except InvalidConversationError as error:
        raise ToolUseError(error.message) from error


def _check(arguments: dict[str, Any], declaration: Tool) -> None:
    validator = Draft202012Validator(dict(declaration.parameters))
    errors = sorted(validator.iter_errors(arguments), key=lambda e: e.json_path)
    if errors:
        said = "; ".join(f"{e.json_path}: {e.message}" for e in errors[:3])
        schema = json.dumps(declaration.parameters)
        raise ToolUseError(f"arguments do not fit: {said}. They must follow {schema}")

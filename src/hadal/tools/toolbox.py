"""All tools of an agent. Whatever the model calls, it gets an answer."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hadal.chat import Tool, ToolCall
from hadal.encoding import check_call
from hadal.errors import ConfigError
from hadal.tools.file_watch import FileWatch
from hadal.tools.tool import RunningTool, Said, ToolOutput, ToolUseError

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

    async def call(
        self, call: ToolCall, request_id: str, said: Said = lambda _: None
    ) -> ToolOutput:
        """Do what a model asks for.

        Args:
            call: As it was parsed.
            request_id: Twice the same does it once.
            said: Told what is printed meanwhile.

        Raises:
            SandboxError: The box or its node failed: that is not the model's fault.
            ConfigError: The schema of the tool is broken.
        """
        fault = check_call(call, self.declarations)
        if fault is not None:
            return ToolOutput(text=f"Error: {fault.message}", failed=True)
        try:
            arguments = call.parsed()
            _check_text(arguments)
            return await self._watched(self._tools[call.name], arguments, request_id, said)
        except ToolUseError as error:
            return ToolOutput(text=f"Error: {error}", failed=True)

    async def _watched(
        self, tool: RunningTool, arguments: dict[str, Any], request_id: str, said: Said
    ) -> ToolOutput:
        if self._watch is None:
            return await tool.call(arguments, request_id, said)
        await self._watch.begin()
        output = await tool.call(arguments, request_id, said)
        return replace(output, files=await self._watch.look())


def _check_text(arguments: dict[str, Any]) -> None:
    """Refuse what a call may spell in JSON and no file, command or journal can hold."""
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ToolUseError("the arguments have half a surrogate pair, which is no text") from error

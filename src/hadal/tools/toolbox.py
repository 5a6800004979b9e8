"""All tools of an agent. Whatever the model calls, it gets an answer."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hadal.chat import Tool, ToolCall
from hadal.encoding import check_call
from hadal.errors import ConfigError, HadalError
from hadal.sandbox import AsyncSandbox
from hadal.tools.bash import BashTool
from hadal.tools.cut import cut_output
from hadal.tools.editor import EditorTool
from hadal.tools.file_watch import FileWatch
from hadal.tools.python import PythonTool
from hadal.tools.schema import check_schema
from hadal.tools.tool import RunningTool, Said, ToolOutput, ToolUseError, cause_of

__all__ = ["Toolbox"]

_LOG = logging.getLogger(__name__)
_HALVES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs: names of files that are no UTF-8 have them, and no encoding takes them."""


class Toolbox:
    """Tools by name.

    Long results are shown as beginning and end; all of them lies in the box of the first tool that has one.

    Args:
        tools: With different names.
        watch: Looks at files after every call.

    Raises:
        ConfigError: Two have the same name, or the schema of one is broken.
    """

    def __init__(self, tools: Sequence[RunningTool], watch: FileWatch | None = None) -> None:
        self._watch = watch
        self._tools = {tool.declaration.name: tool for tool in tools}
        if len(self._tools) != len(tools):
            names = [tool.declaration.name for tool in tools]
            raise ConfigError(f"two tools have the same name: {', '.join(sorted(names))}")
        for declaration in self.declarations:
            check_schema(declaration)
        self._box = _box_of(tools)

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
        """
        output = await self._called(call, request_id, said)
        text = _HALVES.sub("\ufffd", output.text)
        if output.fits:
            return replace(output, text=text)
        name = f"result-{request_id.replace('/', '-')}.txt"
        text, full = await cut_output(self._box, text.encode(), name)
        return replace(output, text=text, full_text=full)

    async def _called(self, call: ToolCall, request_id: str, said: Said) -> ToolOutput:
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
            return await _done(tool, arguments, request_id, said)
        await self._watch.begin()
        output = await _done(tool, arguments, request_id, said)
        return replace(output, files=await self._watch.look())


async def _done(
    tool: RunningTool, arguments: dict[str, Any], request_id: str, said: Said
) -> ToolOutput:
    """Call a tool; what others' code in it raises is an answer, too."""
    try:
        return await tool.call(arguments, request_id, said)
    except (HadalError, ToolUseError):
        raise
    except Exception as error:
        _LOG.debug("a tool failed", exc_info=True, extra={"tool": tool.declaration.name})
        raise ToolUseError(cause_of(error)) from error


def _box_of(tools: Sequence[RunningTool]) -> AsyncSandbox | None:
    """Return where the tools work."""
    return next((t.box for t in tools if isinstance(t, BashTool | EditorTool | PythonTool)), None)


def _check_text(arguments: dict[str, Any]) -> None:
    """Refuse what a call may spell in JSON and no file, command or journal can hold."""
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ToolUseError("the arguments have half a surrogate pair, which is no text") from error

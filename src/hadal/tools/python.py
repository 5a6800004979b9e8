"""`python`: a program of a few lines, in the box."""

from dataclasses import dataclass
from typing import Any

from hadal.chat import Tool
from hadal.errors import CommandRefusedError
from hadal.sandbox import AsyncSandbox
from hadal.tools.cut import KEPT_BYTES, OUTPUT_BYTES, command_output
from hadal.tools.tool import Said, ToolOutput, ToolUseError

__all__ = ["PythonTool"]

_PROGRAM = "import os, sys; os.dup2(1, 2); exec(compile(sys.stdin.read(), '<code>', 'exec'))"
"""Both streams are one; the code comes as input, so that it may be of any length."""


@dataclass
class PythonTool:
    """A Python interpreter in a box, a fresh one for every call.

    Attributes:
        box: Where.
        program: The interpreter.
        timeout_s: Of a call; then all that it started is killed.
        shown_bytes: Of an output.
    """

    box: AsyncSandbox
    program: str = "python3"
    timeout_s: float = 300.0
    shown_bytes: int = OUTPUT_BYTES

    @property
    def declaration(self) -> Tool:
        """Return name, description and schema."""
        return self.declare()

    @staticmethod
    def declare() -> Tool:
        """Return the same without a box."""
        return Tool.of(
            "python",
            "Run a Python program. Only what it prints is returned; nothing stays but files.",
            {
                "type": "object",
                "properties": {"code": {"type": "string"}},
                "required": ["code"],
                "additionalProperties": False,
            },
        )

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Run a program; see `RunningTool.call`."""
        try:
            result = await self.box.run(
                (self.program, "-c", _PROGRAM), stdin=str(arguments["code"]), timeout_s=self.timeout_s,
                output_limit=KEPT_BYTES, request_id=request_id,
            )  # fmt: skip
        except CommandRefusedError as error:
            raise ToolUseError(f"{self.program} was not started: {error.message}") from error
        late = f"killed after {self.timeout_s:g} s"
        return await command_output(self.box, result, self.shown_bytes, late=late)

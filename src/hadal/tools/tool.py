"""What a tool is."""

from dataclasses import dataclass
from typing import Any, Protocol

from hadal.chat import Tool

__all__ = ["RunningTool", "ToolOutput", "ToolUseError"]


@dataclass(frozen=True, kw_only=True)
class ToolOutput:
    """What came of a call.

    Attributes:
        text: For the model.
        failed: Whether it did not do what was asked.
        exit_code: Of the command, where there was one.
        step: Position in the log of the box, where there is one.
        full_text: Path in the box of all of it, where `text` is cut.
    """

    text: str
    failed: bool = False
    exit_code: int | None = None
    step: int | None = None
    full_text: str | None = None


class ToolUseError(Exception):
    """A call that cannot be done as it was asked; the text is for the model."""


class RunningTool(Protocol):
    """A tool that can be called now.

    Attributes:
        declaration: Name, description and schema, as the model sees them.
    """

    @property
    def declaration(self) -> Tool:
        """Return name, description and schema."""
        ...

    async def call(self, arguments: dict[str, Any], request_id: str) -> ToolOutput:
        """Do it.

        Args:
            arguments: They fit the schema.
            request_id: Twice the same does it once.

        Raises:
            ToolUseError: It cannot be done as asked.
            SandboxError: The box or its node failed: that is not the model's fault.
        """
        ...

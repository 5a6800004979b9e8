"""What a tool is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from hadal.chat import Tool

__all__ = ["FileDiff", "RunningTool", "Said", "ToolOutput", "ToolUseError", "cause_of"]

Said = Callable[[str], None]
"""Told what a call prints, piece by piece, for people who watch."""


@dataclass(frozen=True, kw_only=True)
class FileDiff:
    """A file that is another one than before a call.

    Attributes:
        path: In the box.
        kind: What has become of it; "written" where it is new, or came from the image and was first changed now.
        diff: Lines as `diff -u` writes them; "" where the content before or after is not known, or no text.
    """

    path: str
    kind: Literal["written", "changed", "removed"]
    diff: str = ""


@dataclass(frozen=True, kw_only=True)
class ToolOutput:
    """What came of a call.

    Attributes:
        text: For the model.
        fits: Whether the tool has seen to it that `text` is not too long; else the toolbox cuts it.
        failed: Whether it did not do what was asked.
        exit_code: Of the command, where there was one.
        step: Position in the log of the box, where there is one.
        full_text: Path in the box of all of it, where `text` is cut.
        files: What has become of files meanwhile, for people; the model is not told.
    """

    text: str
    fits: bool = False
    failed: bool = False
    exit_code: int | None = None
    step: int | None = None
    full_text: str | None = None
    files: tuple[FileDiff, ...] = ()


class ToolUseError(Exception):
    """A call that cannot be done as it was asked; the text is for the model."""


def cause_of(error: BaseException) -> str:
    """Return type and message of what went wrong, without the groups around it."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class RunningTool(Protocol):
    """A tool that can be called now.

    Attributes:
        declaration: Name, description and schema, as the model sees them.
    """

    @property
    def declaration(self) -> Tool:
        """Return name, description and schema."""
        ...

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Do it.

        Args:
            arguments: They fit the schema.
            request_id: Twice the same does it once.
            said: Told what is printed meanwhile, by tools that can; all of it is in the output, too.

        Raises:
            ToolUseError: It cannot be done as asked.
            SandboxError: The box or its node failed: that is not the model's fault.

        Whatever else is raised and is none of ours, the toolbox tells the model.
        """
        ...

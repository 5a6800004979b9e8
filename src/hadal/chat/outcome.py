"""How a completion ended, and everything about it that was not as the format wants it."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Problem", "ProblemKind", "Termination"]


class Termination(StrEnum):
    """How a completion ended."""

    STOP = "stop"
    """The answer is complete."""
    TOOL_CALLS = "tool_calls"
    """At least one complete call, and nothing is missing or malformed."""
    LENGTH_IN_REASONING = "length_in_reasoning"
    """Cut off while thinking: there is no answer."""
    LENGTH_IN_CONTENT = "length_in_content"
    """Cut off in the answer."""
    LENGTH_IN_CALL = "length_in_call"
    """Cut off within the block of calls; calls that had closed before are complete."""
    MALFORMED = "malformed"
    """Something was lost or cannot be trusted: see the problems that are marked fatal."""

    @property
    def finish_reason(self) -> str:
        """The word that chat APIs use: stop, tool_calls, length; malformed stays malformed."""
        return "length" if self.value.startswith("length") else self.value


class ProblemKind(StrEnum):
    """What was not as the format wants it. The second group is fatal."""

    DUPLICATE_THINK = "duplicate_think"
    """A think tag that the prompt or the model had already written; dropped."""
    IMPLICIT_REASONING_END = "implicit_reasoning_end"
    """Calls began inside the reasoning, which therefore ended there."""
    LOOSE_WHITESPACE = "loose_whitespace"
    """Line breaks between tags were missing, extra or indented."""
    UNCLOSED_PARAMETER = "unclosed_parameter"
    """The next parameter began before the end tag of this one."""
    UNCLOSED_INVOKE = "unclosed_invoke"
    """The block ended before the end tag of its last call."""
    UNCLOSED_BLOCK = "unclosed_block"
    """The turn ended after a closed call, before the end tag of the block."""
    EMPTY_BLOCK = "empty_block"
    """A block without a call."""
    TEXT_AFTER_CALLS = "text_after_calls"
    """More text or a second block after the calls; it is kept."""
    RECOVERED_CALL = "recovered_call"
    """A closed, complete call of a declared tool outside a proper block; it was accepted."""
    UNWRAPPED_ARGUMENTS = "unwrapped_arguments"
    """All arguments came inside one parameter that the tool does not have; they were taken out."""
    UNDECLARED_TOOL = "undeclared_tool"
    """A well-formed call of a tool that was not declared."""
    QUOTED_MARKUP = "quoted_markup"
    """Text mentions the markup in the middle of a line; it stays text."""
    CONTROL_TOKEN_IN_TEXT = "control_token_in_text"
    """The spelling of a control token in the text; it stays text."""
    INVALID_UTF8 = "invalid_utf8"
    """Bytes that are not UTF-8; each became U+FFFD, and they are in the problem's text."""

    TRUNCATED_CALL = "truncated_call"
    """A call that was cut off; its text and what could be read of it are in the problem."""

    MALFORMED_CALL = "malformed_call"
    """A call that breaks the format; its text and what could be read of it are in the problem."""
    UNPARSED_MARKUP = "unparsed_markup"
    """Markup at the start of a line that is no call; it stays text, and the model meant more."""
    JUNK_IN_BLOCK = "junk_in_block"
    """Text between calls where only calls may stand."""
    CALLS_NOT_ENABLED = "calls_not_enabled"
    """A block of calls in a request without tools."""
    REASONING_NOT_CLOSED = "reasoning_not_closed"
    """The model ended its turn while thinking."""
    TEXT_AFTER_END = "text_after_end"
    """Text after the end of the turn."""

    @property
    def fatal(self) -> bool:
        """Whether the completion counts as malformed."""
        return self in _FATAL


_FATAL = frozenset(
    {
        ProblemKind.MALFORMED_CALL,
        ProblemKind.UNPARSED_MARKUP,
        ProblemKind.JUNK_IN_BLOCK,
        ProblemKind.CALLS_NOT_ENABLED,
        ProblemKind.REASONING_NOT_CLOSED,
        ProblemKind.TEXT_AFTER_END,
    }
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that was not as the format wants it.

    Attributes:
        kind: What it is.
        offset: Where it begins, in characters of the completion.
        reason: What was expected and what was found.
        text: The characters concerned, if they ended up nowhere else.
        name: Tool of a malformed call, as far as it was read.
        arguments: JSON text of the parameters of a malformed call that were complete.
    """

    kind: ProblemKind
    offset: int
    reason: str
    text: str = ""
    name: str | None = None
    arguments: str | None = None

    @property
    def fatal(self) -> bool:
        """Whether the completion counts as malformed because of it."""
        return self.kind.fatal

    def __str__(self) -> str:
        return f"{self.kind} at character {self.offset}: {self.reason}"

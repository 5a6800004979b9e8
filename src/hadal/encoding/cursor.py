"""The place in a completion that a parser has reached, and what it has made of the text before.

Everything that moves forward goes through `take`: it is where the conservation of characters is
kept, and where `spans` are recorded for the tests that check it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from hadal.chat.messages import Tool, ToolCall
from hadal.chat.outcome import Problem, ProblemKind
from hadal.encoding.calls import OpenCall
from hadal.encoding.deltas import ContentDelta, Delta, ReasoningDelta, Section
from hadal.encoding.markers import markers_of
from hadal.encoding.tags import Tags

__all__ = ["NEVER", "SPACE", "Cursor", "Span"]

Span = tuple[str, int, int]
"""(reasoning | content | argument | markup | malformed, first character, one past the last)."""

SPACE: Final = re.compile(r"[ \t\r\n]*")
NEVER: Final = 1 << 62
_LONGEST_PREFIX: Final = 40


class Cursor:
    """Buffer, position, output and problems of one completion."""

    def __init__(
        self,
        tags: Tags,
        *,
        start: Section,
        tools: Sequence[Tool] | None,
        new_id: Callable[[], str],
        budgets: Mapping[Section, int] | None,
        record: bool,
    ) -> None:
        self.spans: list[Span] = []
        self._record = record
        self._markers = markers_of(tags)
        self._tools = None if tools is None else {tool.name: tool for tool in tools}
        self._new_id = new_id
        self._budgets = dict(budgets or {})

        self._buffer = ""
        self._at = 0  # next character of the buffer
        self._base = 0  # offset of the buffer within the completion
        self._final = False

        self._out: list[Delta] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._content_from = 0
        self._calls: list[ToolCall] = []
        self._problems: list[Problem] = []
        self._had_block = False

        self._call: OpenCall | None = None
        self._raw: list[str] = []  # text of the call being read
        self._broken: Problem | None = None  # what is being skipped, without its text
        # A call on trial: where it began, and the output and problems before it.
        self._held: tuple[int, list[Delta], list[Problem]] | None = None
        self._fast: Literal["reasoning", "content", "value"] | None = None
        self._enter(start)

    @property
    def _offset(self) -> int:
        return self._base + self._at

    def _enter(self, section: Section) -> None:
        self.section: Section = section
        self._said = False  # whether this stretch of text has begun
        self._line_start = True
        self._fast = None
        budget = self._budgets.get(section)
        self._deadline = NEVER if budget is None else self._offset + budget

    def _note(self, kind: ProblemKind, reason: str, offset: int | None = None) -> None:
        at = self._offset if offset is None else offset
        self._problems.append(Problem(kind, at, reason))

    def _take(self, kind: str, end: int) -> str:
        """Advance to `end`; the characters between are of this kind."""
        piece = self._buffer[self._at : end]
        if self._call is not None or self._held is not None or self._broken is not None:
            self._raw.append(piece)
        if self._record and piece:
            self.spans.append((kind, self._offset, self._base + end))
        self._at = end
        return piece

    def _say(self, end: int) -> None:
        """Advance to `end`; the characters between are text of the current section."""
        if end > self._at:
            self._utter(self._take(self.section, end))

    def _utter(self, text: str) -> None:
        if self.section == "content" and self._had_block and not self._said:
            start = self._offset - len(text)
            self._note(ProblemKind.TEXT_AFTER_CALLS, "the turn goes on after its calls", start)
        self._said = True
        self._line_start = text.endswith("\n")
        if self.section == "reasoning":
            self._reasoning.append(text)
            self._out.append(ReasoningDelta(text))
        else:
            if not self._content:
                self._content_from = self._offset - len(text)
            self._content.append(text)
            self._out.append(ContentDelta(text))
        if not self._record:
            self._fast = "reasoning" if self.section == "reasoning" else "content"

    def _hold_from(self, prefixes: frozenset[str]) -> int:
        """Where a tag that has not fully arrived may begin; the end of the buffer if nowhere."""
        buffer = self._buffer
        if self._final:
            return len(buffer)
        at = buffer.rfind("<", max(self._at, len(buffer) - _LONGEST_PREFIX))
        return at if at >= 0 and buffer[at:] in prefixes else len(buffer)

    def _before_newlines(self, at: int) -> int:
        """Step back over the blank line that belongs to a block."""
        for _ in range(2):
            if at > self._at and self._buffer[at - 1] == "\n":
                at -= 1
        return at

    def _starts_line(self, at: int) -> bool:
        return self._buffer[at - 1] == "\n" if at > self._at else self._line_start

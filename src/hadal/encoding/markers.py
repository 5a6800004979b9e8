"""The literals that a parser looks for, compiled once per generation.

All of them begin with `<` and hold no other `<`, so that at most the last `<` of a buffer can be
the beginning of one that has not fully arrived.
"""

import re
from functools import lru_cache

from hadal.encoding.tags import Tags
from hadal.encoding.tokens import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    SYSTEM,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)

__all__ = ["KEY_LIMIT", "NAME_LIMIT", "Markers", "markers_of"]

NAME_LIMIT = 256
"""Longest tool name that is recognised, in characters; it bounds what is held back."""
KEY_LIMIT = 1024
"""Longest parameter name that is recognised, in characters."""

_GAP_LIMIT = 16
"""Most whitespace between a wrapper and its first call."""

_STRAY = (
    BOS, USER, ASSISTANT, SYSTEM, LATEST_REMINDER, *TASKS.values(), "<｜▁pad▁｜>"
)  # fmt: skip


def _any_of(*literals: str) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(s) for s in literals))


def _prefixes(*literals: str) -> frozenset[str]:
    return frozenset(s[:n] for s in literals for n in range(1, len(s)))


class Markers:
    """Everything that can end or interrupt a stretch of text, for one set of tags."""

    def __init__(self, tags: Tags) -> None:
        self.block_open = tags.block_open
        self.block_close = tags.block_close
        self.invoke_open = tags.invoke_open_prefix
        self.invoke_close = tags.invoke_close
        self.parameter_open = tags.parameter_open_prefix
        self.parameter_close = tags.parameter_close
        self.block_name = tags.block

        opener, closer = f"<{DSML}", f"</{DSML}"
        in_text = (THINK_START, THINK_END, EOS, opener, closer, *_STRAY)
        self.in_text = _any_of(*in_text)
        self.in_text_prefixes = _prefixes(*in_text)

        self.in_value = _any_of(self.parameter_close, self.parameter_open)
        # A whole EOS is held too: it ends the turn only if nothing follows.
        self.in_value_prefixes = _prefixes(self.parameter_close, self.parameter_open, EOS) | {EOS}

        self.resync_prefixes = _prefixes(self.invoke_open, self.block_close, EOS)

        # Where a tag is due, whatever begins like one of these is waited for.
        self.in_block_prefixes = _prefixes(self.invoke_open, self.block_close, EOS)
        self.in_invoke_prefixes = _prefixes(
            self.parameter_open, self.invoke_close, self.block_close, EOS
        )

        self.header = re.compile('(.*?)" string="(true|false)">', re.DOTALL)
        self._wrapper = re.compile(f'<{DSML}([^<>"\\n]{{1,32}})>[ \\t\\r\\n]{{0,{_GAP_LIMIT}}}')
        self._wrapper_begun = re.compile(f'<{DSML}[^<>"\\n]{{0,32}}\\Z')

    def opening(self, buffer: str, at: int) -> tuple[str, int] | None:
        """What the `<｜DSML｜` at this place opens.

        Returns:
            ("block", length of the wrapper and the whitespace after it) for a wrapper that is
            followed by a call, ("empty", whole length) for one that is followed by its end,
            ("wrapper", as for block) for another name around a call, ("invoke", 0) for a bare
            call, ("text", 0) for anything else; None if more must arrive before that is known.
        """
        rest = buffer[at : at + 2 * NAME_LIMIT]
        if rest.startswith(self.invoke_open):
            return "invoke", 0
        if self.invoke_open.startswith(rest):
            return None
        wrapper = self._wrapper.match(rest)
        if wrapper is None:
            return None if self._wrapper_begun.match(rest) else ("text", 0)
        inner = rest[wrapper.end() :]
        is_block = wrapper[1] == self.block_name
        if inner.startswith(self.invoke_open):
            return ("block" if is_block else "wrapper"), wrapper.end()
        if is_block and inner.startswith(self.block_close):
            return "empty", wrapper.end() + len(self.block_close)
        if self.invoke_open.startswith(inner) or (is_block and self.block_close.startswith(inner)):
            return None
        return "text", 0


@lru_cache(maxsize=8)
def markers_of(tags: Tags) -> Markers:
    """The markers for these tags, shared by all parsers."""
    return Markers(tags)

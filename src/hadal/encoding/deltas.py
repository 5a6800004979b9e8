"""What a streaming parser hands out while a completion arrives."""

from dataclasses import dataclass
from typing import Literal

from hadal.chat.outcome import Problem

__all__ = [
    "ArgumentsDelta",
    "CallEnd",
    "CallFailed",
    "CallStart",
    "ContentDelta",
    "Delta",
    "Overrun",
    "ReasoningDelta",
    "Section",
]

Section = Literal["reasoning", "content", "calls"]
"""Part of a completion; also where the parsing of one begins."""


@dataclass(slots=True)  # not frozen: these are made for every token, and freezing doubles the cost
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(slots=True)
class CallStart:
    """A call began. Do not run it before its `CallEnd`."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(slots=True)
class CallEnd:
    """The call is complete and its arguments are valid JSON."""

    index: int


@dataclass(slots=True)
class CallFailed:
    """The call that had begun is malformed or cut off; it must not be run."""

    index: int
    problem: Problem


@dataclass(slots=True)
class Overrun:
    """A section has grown past the budget given for it; told once, and parsing goes on."""

    section: Section
    budget: int


Delta = ReasoningDelta | ContentDelta | CallStart | ArgumentsDelta | CallEnd | CallFailed | Overrun

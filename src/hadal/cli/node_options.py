"""Which node daemon a command talks to, and how what a box says is shown."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

if TYPE_CHECKING:
    from hadal.sandbox.nodes import AsyncNode

__all__ = ["NodeOptions", "printable"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The node.

    Attributes:
        node: URL of a node daemon, `unix:///path` or `https://host:port`. Default: $HADAL_NODE, else the
            one of this user on this machine, started when it is needed.
        key: Its API key. Default: $HADAL_NODE_KEY, which other users of this machine cannot read.
        ca: Certificate to trust, of a node with its own. Default: $HADAL_NODE_CA.
    """

    node: str | None = None
    key: str | None = None
    ca: Path | None = None

    def open(self, *, start: bool = True) -> "AsyncNode":
        """Return a connection; with `start` the embedded node is started where it is needed."""
        from hadal.sandbox.nodes import AsyncNode

        return AsyncNode(self.node, key=self.key, verify=self.ca, start=start)


def printable(text: str, limit: int = 200) -> str:
    """Return text of a box for a terminal: on one line, without control characters, and not endless."""
    shown = "".join(
        character if not unicodedata.category(character).startswith("C") else _escaped(character)
        for character in text[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

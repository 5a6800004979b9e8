"""Which node daemon a command talks to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

if TYPE_CHECKING:
    from hadal.sandbox.nodes import AsyncNode

__all__ = ["NodeOptions"]


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

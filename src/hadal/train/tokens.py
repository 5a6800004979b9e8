"""Token ids of a sample, and which of them are learned."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """A part of a sample.

    Attributes:
        ids: Token ids.
        said: Which of them the model says; those are learned.
    """

    ids: list[int]
    said: list[bool]

    def add(self, ids: Sequence[int], *, said: bool) -> None:
        """Append tokens."""
        self.ids.extend(ids)
        self.said.extend([said] * len(ids))

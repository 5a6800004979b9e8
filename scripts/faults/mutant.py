"""What a planted fault is."""

from dataclasses import dataclass

__all__ = ["Mutant"]


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Attributes:
        name: What is wrong.
        file: Where, below src/hadal.
        old: Text that occurs there exactly once.
        new: What it becomes.
        tests: Tests to run, quickest to find something first; one of them has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

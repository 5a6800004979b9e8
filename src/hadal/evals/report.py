"""Scores by family, with what chance allows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hadal.agent import Outcome
from hadal.evals.task_run import TaskResult

__all__ = ["FamilyScore", "interval", "scores"]


@dataclass(frozen=True)
class FamilyScore:
    """Results of a family.

    Attributes:
        family, level: Which.
        solved, count: Of them; void ones count as none.
        void: Runs in which our machinery failed.
        low, high: 95 % interval of the share.
    """

    family: str
    level: int
    solved: int
    count: int
    void: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Return the share that was solved; 0 of none."""
        return self.solved / self.count if self.count else 0.0


def interval(solved: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's score interval)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, solved / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def scores(results: Iterable[TaskResult]) -> list[FamilyScore]:
    """Return the scores of all families, by level and name."""
    by_family: dict[tuple[int, str], list[TaskResult]] = {}
    for result in results:
        by_family.setdefault((result.level, result.family), []).append(result)
    found: list[FamilyScore] = []
    for (level, family), own in sorted(by_family.items()):
        counted = [r for r in own if r.outcome is not Outcome.VOID]
        solved = sum(r.solved for r in counted)
        found.append(
            FamilyScore(
                family,
                level,
                solved,
                len(counted),
                len(own) - len(counted),
                *interval(solved, len(counted)),
            )
        )
    return found

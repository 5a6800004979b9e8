"""Scores, with what chance allows: of all results, and by family."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hadal.agent import Outcome
from hadal.evals.task_run import TaskResult

__all__ = ["Score", "interval", "scores", "well_formed"]


@dataclass(frozen=True)
class Score:
    """How many tasks were solved.

    Attributes:
        solved, count: Of them; void ones count as none.
        void: Runs in which our machinery failed.
    """

    solved: int
    count: int
    void: int = 0

    @classmethod
    def of(cls, results: Iterable[TaskResult]) -> "Score":
        """Count results."""
        outcomes = [(r.outcome is Outcome.VOID, r.solved) for r in results]
        counted = [solved for void, solved in outcomes if not void]
        return cls(sum(counted), len(counted), len(outcomes) - len(counted))

    @property
    def share(self) -> float:
        """Return the share that was solved; 0 of none."""
        return self.solved / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the share."""
        return interval(self.solved, self.count)

    def __str__(self) -> str:
        """Return the share with its interval."""
        low, high = self.interval
        return f"{self.share:.1%} ({low:.1%} to {high:.1%})" if self.count else "none"


def interval(solved: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's score interval)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, solved / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def scores(results: Iterable[TaskResult]) -> dict[tuple[int, str], Score]:
    """Return the score of each level and family, in this order."""
    by_family: dict[tuple[int, str], list[TaskResult]] = {}
    for result in results:
        by_family.setdefault((result.level, result.family), []).append(result)
    return {key: Score.of(own) for key, own in sorted(by_family.items())}


def well_formed(results: Iterable[TaskResult]) -> tuple[int, int]:
    """Return how many calls were well-formed, and of how many."""
    counts = [(r.calls - r.malformed_calls, r.calls) for r in results]
    return sum(good for good, _ in counts), sum(calls for _, calls in counts)

"""What many families share: a solution of fixed commands."""

from collections.abc import Callable

from hadal.tasks.task import Answer, Call, Solution

__all__ = ["DONE", "fixed"]

DONE = Answer("That is done.", "Done.")


def fixed(*steps: Call) -> Callable[[], Solution]:
    """Return a solution that makes these calls, whatever they return."""

    def solve() -> Solution:
        for step in steps:  # noqa: UP028 - nothing is sent on to a tuple
            yield step
        yield DONE

    return solve

"""Steps of a box: written down as begun, then done, then written down as done or refused."""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hadal.errors import HadalError
from hadal.node.box import Box
from hadal.node.command import refusal_of
from hadal.node.journal import Journal, Record

__all__ = ["Step", "begin_step", "recorded_step"]


@dataclass
class Step:
    """A step that is under way.

    Attributes:
        result: To be written down, as JSON.
        stdout: To be kept beside it.
        stays_begun: Whether a failure leaves it begun, for the same request to try again.
    """

    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stdout: bytes = b""
    stays_begun: bool = False


def recorded_step(
    journal: Journal, box: Box, request_id: str, *, repeatable: bool
) -> Record | None:
    """Return the record that a request has made; None where it has made none.

    Args:
        journal: Of the node.
        box: Whose step.
        request_id: Of the request.
        repeatable: Whether a step that was begun may be done again.

    Raises:
        CommandRefusedError, UnknownOutcomeError: It was not done, or nobody knows.
    """
    record = journal.record_of_request(box.id, request_id)
    allowed = ("done", "begun") if repeatable else ("done",)
    if record is not None and record.event.state not in allowed:
        raise refusal_of(record)
    return record


@contextlib.contextmanager
def begin_step(
    journal: Journal, box: Box, kind: str, request: Mapping[str, Any], *, request_id: str,
    record: Record | None = None, details: Mapping[str, Any] | None = None,
) -> Generator[Step]:  # fmt: skip
    """Yield a step that is written down as begun; when the block is left, also what came of it.

    Args:
        journal: Of the node.
        box: Whose step.
        kind: Of the record.
        request: What makes it another one.
        request_id: Of whoever asks.
        details: What is kept beside the request.
        record: Where it was begun before: the step is the same one.
    """
    if record is not None:
        position = record.event.position
    else:
        position = box.begin(kind, request, request_id=request_id, details=details)
    step = Step()
    try:
        yield step
    except HadalError as error:
        if not step.stays_begun:
            journal.end(box.id, position, "refused", {"message": error.message, "errno": 0})
        raise
    journal.end(box.id, position, "done", step.result, stdout=step.stdout)

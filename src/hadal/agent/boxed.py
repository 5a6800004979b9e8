"""The box of a run: made once, found again when the run goes on."""

import uuid
from collections.abc import Callable
from typing import Any

from hadal.agent.journal import Journal
from hadal.sandbox import AsyncSandbox
from hadal.sandbox.specs import Spec

__all__ = ["note_box", "open_box"]


async def open_box(journal: Journal, spec: Spec) -> tuple[AsyncSandbox, bool]:
    """Return the box that a run has, or make it.

    The request is named after the run, so that a run that dies while its box is made finds that one. The box
    does not end with the block: whoever is done with the run kills it.

    Args:
        journal: Of the run.
        spec: What to make.

    Returns:
        The box, and whether it is new to the run: then nothing has been put into it for certain.

    Raises:
        SandboxGoneError: It is no more.
        SandboxError: It cannot be made or reached.
    """
    known = next((e for e in journal.events if e["kind"] == "box"), None)
    if known is not None:
        return await AsyncSandbox.connect(known["id"]), False
    number = next((e["number"] for e in journal.events if e["kind"] == "making_box"), None)
    if number is None:
        number = journal.append("making_box", number=uuid.uuid4().hex)["number"]
    box = await AsyncSandbox.create(spec, request_id=f"run/{number}")
    box.detach()
    return box, True


def note_box(
    journal: Journal, box: AsyncSandbox, watch: Callable[[dict[str, Any]], None], **fields: Any
) -> None:
    """Write down that the box is there, with all that belongs into it."""
    watch(journal.append("box", id=box.id, **fields))

"""`hadal replay`: run recorded steps of an engine again."""

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["replay"]

_VERDICTS = {True: "the same", False: "DIFFERENT", None: "not repeated: held to a grammar"}


def replay(
    log: Path,
    checkpoint: Path,
    *,
    step: Annotated[list[int], Parameter(negative="")],
    device: str = "cpu",
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Run steps of a step log again, each alone, and compare the tokens. Exit code 1: they differ.

    `hadal serve --step-log FILE` writes such a log. It holds every prompt in full.

    Examples:
        hadal replay steps.jsonl path/to/checkpoint --step 120

    Args:
        log: The step log.
        checkpoint: The weights that it was written with.
        step: Number of a step; can be repeated.
        device: Where the model runs.
        json_output: Print one JSON object a step.
    """
    from hadal.checkpoint import load
    from hadal.engine import replay_step

    model = load(checkpoint, device=device).eval()
    differ = False
    for number in step:
        found = replay_step(log, model, number)
        differ |= not found.equal
        for request_id, recorded in found.recorded.items():
            repeated = found.repeated[request_id]
            equal = None if repeated is None else repeated == recorded
            if json_output:
                line = {
                    "step": number,
                    "request": request_id,
                    "recorded": recorded,
                    "repeated": repeated,
                    "equal": equal,
                }
                text = json.dumps(line)
            else:
                text = f"step {number}, {request_id}: {recorded}: {_VERDICTS[equal]}"
            sys.stdout.write(text + "\n")
    if differ:
        sys.exit(1)

"""`hadal doctor`: what this machine can do for boxes, found by doing it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hadal.errors import InputError
from hadal.node.doctor.finding import Finding
from hadal.node.doctor.probes import probes
from hadal.node.doctor.verdicts import Verdict, verdicts

__all__ = ["Finding", "Verdict", "examine", "verdicts"]

_AT_A_TIME = 4


def examine(state: Path) -> list[Finding]:
    """Run every probe and return what they found, in the order of the report.

    Args:
        state: Where boxes would be; what is tried on its file system leaves nothing there.

    Raises:
        InputError: Nothing can be written there.
    """
    at = next(folder for folder in (state, *state.resolve().parents) if folder.is_dir())
    try:
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            running = [pool.submit(probe) for probe in probes(at.resolve())]
            return [found.result() for found in running]
    except PermissionError as error:
        raise InputError(f"nothing can be tried in {at}: {error.strerror}") from error

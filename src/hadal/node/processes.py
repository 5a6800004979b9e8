"""Processes of the host, by their numbers."""

import os
from pathlib import Path

__all__ = ["is_alive", "start_time"]


def is_alive(pid: int) -> bool:
    """Return whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def start_time(pid: int) -> int | None:
    """Return when a process was started, in ticks since boot: with the pid it names the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])

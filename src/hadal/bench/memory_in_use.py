"""What memory the host has left, and what processes take of it."""

import statistics
import time
from pathlib import Path

__all__ = ["proportional_bytes", "settled_bytes"]

_STILL_BYTES, _PATIENCE_S = 1 << 20, 20.0


def _available_bytes() -> int:
    """Return the memory that the host could still give: the median of five looks."""
    values: list[int] = []
    for _ in range(5):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        values.append(
            int(next(x for x in text.splitlines() if x.startswith("MemAvailable")).split()[1])
        )
        time.sleep(0.05)
    return round(statistics.median(values) * 1024)


def settled_bytes() -> int:
    """Return it when it has not changed by more than 1 MiB for a second: what has ended is given back after a while."""
    end, last = time.monotonic() + _PATIENCE_S, _available_bytes()
    while time.monotonic() < end:
        time.sleep(1)
        now = _available_bytes()
        if abs(now - last) <= _STILL_BYTES:
            return now
        last = now
    return last


def proportional_bytes(ancestor: int, name: str) -> int:
    """Return the memory of processes, with what several share divided among them (PSS).

    Args:
        ancestor: Whose descendants they are.
        name: How their own begins.
    """
    parents, found = _parents(), 0
    for pid in parents:
        process, above = Path("/proc", str(pid)), pid
        while above not in (0, ancestor):
            above = parents.get(above, 0)
        try:
            if above == ancestor and (process / "comm").read_text().startswith(name):
                found += _pss(process)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return found


def _parents() -> dict[int, int]:
    found: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(status.parent.name)] = int(fields[1])
    return found


def _pss(process: Path) -> int:
    lines = (process / "smaps_rollup").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024

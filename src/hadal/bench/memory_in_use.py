"""What memory the host has left."""

import statistics
import time
from pathlib import Path

__all__ = ["settled_bytes"]

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

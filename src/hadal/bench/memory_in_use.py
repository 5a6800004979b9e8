"""What memory the host has left."""

import statistics
import time
from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes() -> int:
    """Return the memory that the host could still give: the median of five looks."""
    values: list[int] = []
    for _ in range(5):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        values.append(
            int(next(x for x in text.splitlines() if x.startswith("MemAvailable")).split()[1])
        )
        time.sleep(0.05)
    return round(statistics.median(values) * 1024)

"""How every benchmark counts and prints: medians and spread of interleaved rounds, ratios, the machine."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

__all__ = ["CLOCKS", "ClockName", "Report", "Spread", "interleave", "timed"]

ClockName = Literal["wall", "cpu"]
CLOCKS: Final[dict[ClockName, Callable[[], float]]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
}
"""CPU time leaves out what other work on the machine takes, but means nothing with more than one
thread, because threads spin while they wait."""


@dataclass(frozen=True)
class Spread:
    """Median and range of some rounds, in seconds unless the figure says otherwise."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Return the spread of measured values."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g}..{self.high:.4g}, {self.rounds})"


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        workload: Its name and what ran.
        figures: By name; a `Spread`, a number or a text.
        notes: What a reader must know to judge them.
    """

    workload: str
    figures: dict[str, Spread | float | str] = field(
        default_factory=dict[str, "Spread | float | str"]
    )
    notes: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """Return everything, and the machine."""
        figures = {k: asdict(v) if isinstance(v, Spread) else v for k, v in self.figures.items()}
        return {
            "workload": self.workload,
            "machine": machine(),
            "figures": figures,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """Return a table: median (lowest..highest, rounds)."""
        width = max(map(len, self.figures), default=0)
        lines = [self.workload, machine()]
        for name, value in self.figures.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"  {name:{width}}  {shown}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def machine() -> str:
    """Return what the figures depend on."""
    name = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    torch = sys.modules.get("torch")  # a benchmark that has no use for it runs without
    if torch is None:
        return name
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def timed(call: Callable[[], object], clock: ClockName = "wall") -> float:
    """Return the seconds of one call."""
    start = CLOCKS[clock]()
    call()
    return CLOCKS[clock]() - start


def interleave(
    runners: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, Spread]:
    """Time runners in turn, round by round, so that noise meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + warm_up):
        for name, run in runners.items():
            seconds = timed(run)
            if number or not warm_up:
                samples[name].append(seconds)
    return {name: Spread.of(values) for name, values in samples.items()}

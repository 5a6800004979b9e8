"""What this machine can do at most: products and copies, measured beside what is judged by them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hadal.bench.report import ClockName, Spread, timed

__all__ = ["Limits", "LimitsOfRounds"]

_SIDE = 2048
_SMALL_SIDE = 256
_SLOW_GFLOPS = 20.0
_BYTES = 256 << 20
"""Of a copy: more than any cache of a processor."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Best of some tries.

    Attributes:
        fp32_gflops: Matrix product in float32, two FLOPs a multiply-add.
        bf16_gflops: The same in BF16.
        copy_gbps: Bytes read and written by a copy, in GB a second.
    """

    fp32_gflops: float
    bf16_gflops: float
    copy_gbps: float

    @classmethod
    def measured(
        cls,
        clock: ClockName = "wall",
        *,
        size: int = _SIDE,
        copy_bytes: int = _BYTES,
        tries: int = 3,
    ) -> "Limits":
        """Measure with matrices of this size and a copy of so many bytes."""

        def gflops(dtype: torch.dtype) -> float:
            small, rate = min(size, _SMALL_SIDE), 0.0
            for side in (
                small,
                size,
            ):  # a processor without BF16 would take minutes for a large one
                a, b = (torch.ones(side, side, dtype=dtype) for _ in range(2))
                rate = 2 * side**3 / _best(lambda a=a, b=b: a @ b, tries, clock) / 1e9
                if rate < _SLOW_GFLOPS:
                    break
            return rate

        source, target = (torch.ones(copy_bytes, dtype=torch.uint8) for _ in range(2))
        copy = 2 * copy_bytes / _best(lambda: target.copy_(source), tries, clock) / 1e9
        return cls(
            fp32_gflops=gflops(torch.float32), bf16_gflops=gflops(torch.bfloat16), copy_gbps=copy
        )


def _best(call: Callable[[], object], tries: int, clock: ClockName) -> float:
    call()
    return min(timed(call, clock) for _ in range(tries))


class LimitsOfRounds:
    """Limits measured again in every round, because other work on the machine lowers them too."""

    def __init__(self) -> None:
        self._rounds: list[Limits] = []

    def add(self, limits: Limits) -> None:
        """Take those of one more round."""
        self._rounds.append(limits)

    @property
    def median(self) -> Limits:
        """Return the median of each."""
        spreads = self.spreads()
        return Limits(**{name: spread.median for name, spread in spreads.items()})

    def spreads(self) -> dict[str, Spread]:
        """Return each with its spread."""
        names = ("fp32_gflops", "bf16_gflops", "copy_gbps")
        return {n: Spread.of([getattr(limits, n) for limits in self._rounds]) for n in names}

"""How many threads a step takes: one, where there is too little to share."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import lru_cache

import torch

from hadal.config import ModelConfig
from hadal.cost.flops import flops_per_token

__all__ = ["few_threads"]

_SHARED_FLOPS = 1e8
"""Below so many a second thread gains nothing, and beside other load it costs three to ten times the step, which waits
at the end of every small operation until the system lets the other thread run (dev/LOG.md)."""


@contextmanager
def few_threads(config: ModelConfig, work: Iterable[tuple[int, int]]) -> Generator[None]:
    """Run a step on one thread if it is small.

    Args:
        config: Of the network.
        work: Tokens of each sequence that are run, and those that it has by then.
    """
    threads = torch.get_num_threads()
    small = sum(count * _flops(config, end.bit_length()) for count, end in work) < _SHARED_FLOPS
    if threads == 1 or not small:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=256)
def _flops(config: ModelConfig, bits: int) -> float:
    return sum(part.count for part in flops_per_token(config, 1 << bits))

"""What the processes of a training run keep: memory of large tensors, but not without end, and compiled products."""

import ctypes
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from ctypes.util import find_library
from typing import Final

__all__ = ["Trimmer", "kept"]

_KEEP_MEMORY: Final = {
    "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4_000_000_000),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Of jemalloc, and of glibc: otherwise the memory of every large tensor is given back and faulted in again,
which takes as long as half of a step."""
_KEEP_PRODUCTS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192", "LRU_CACHE_CAPACITY": "8192"}
"""Of oneDNN, and of torch before it: experts have another number of tokens in every step, and 1,024 forms of a
product, as many as both keep otherwise, are not enough: 12 % of a step goes into compiling them again, then 4."""
_TRIM_EVERY_S: Final = 60.0
_ALL_ARENAS: Final = b"arena.4096.purge"


@contextmanager
def kept() -> Generator[None]:
    """Let processes that start meanwhile keep what training needs again, where nobody has chosen otherwise.

    Memory by jemalloc, where it is installed: glibc takes a fifth of a step to search its free chunks (dev/LOG.md).
    """
    found = find_library("jemalloc")
    wanted = _KEEP_MEMORY | _KEEP_PRODUCTS | ({"LD_PRELOAD": found} if found else {})
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


class Trimmer:
    """Gives memory that jemalloc keeps free back to the system, now and then.

    Samples have other lengths in every step, so tensors seldom fit what others have left: without this a
    worker grows by 130 MB a step (dev/LOG.md).
    """

    def __init__(self) -> None:
        process = ctypes.CDLL(None)
        self._control = process.mallctl if hasattr(process, "mallctl") else None
        self._trimmed = time.monotonic()

    def trim(self) -> None:
        """Do it, if the last time is a minute ago; nothing where another allocator is used."""
        if self._control is None or time.monotonic() - self._trimmed < _TRIM_EVERY_S:
            return
        self._control(_ALL_ARENAS, None, None, None, ctypes.c_size_t(0))
        self._trimmed = time.monotonic()

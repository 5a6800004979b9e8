"""Whether kernels are used."""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

__all__ = ["is_on", "without_kernels"]

_ON: ContextVar[bool] = ContextVar("hadal_kernels", default=True)


def is_on() -> bool:
    """Return whether kernels are used where they apply."""
    return _ON.get()


@contextlib.contextmanager
def without_kernels() -> Generator[None]:
    """Run a block in which every module does what it says itself."""
    token = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(token)

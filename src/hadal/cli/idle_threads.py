"""How long a thread without work spins before it sleeps."""

import os

__all__ = ["SPIN_COUNT", "let_idle_threads_sleep"]

SPIN_COUNT = 5000
"""Turns of libgomp's loop: about 0.3 ms, where its own default is about 15.

A model alone is a few percent slower with it. Beside another program on the same cores, such as what an agent runs in its
box, it is not 30 times slower any more: the threads of each took the cores from those that the other waited for
(dev/LOG.md).
"""


def let_idle_threads_sleep() -> None:
    """Set it for this process and its children, unless the user has; to be called before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))

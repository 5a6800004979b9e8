"""Faster ways of what the model's modules say, chosen where they apply; the modules stay what is true.

`without_kernels()` leaves them out, for tests and for reading along.
"""

from hadal.model.kernels.switch import is_on, without_kernels

__all__ = ["is_on", "without_kernels"]

"""The library of native/, in C, without headers or symbols of torch: called with addresses and sizes."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hadal.errors import ConfigError
from hadal.model.kernels.switch import is_on

__all__ = ["LEVELS", "level", "library", "library_for"]

LEVELS = ("plain", "avx2", "avx512")
"""Forms of the kernels, as the library numbers them."""
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_FUNCTIONS = {
    "hadal_stored_product": [_P, _L, _L, _L, _P, _P, _I, _L, _L, _L, _L, _P, _I],
    "hadal_round_inputs": [_P, _L, _L, _P, _L, _I],
    "hadal_mhc_read": [_P, _I, _L, _L, _L, _P, _P, _P, _I, _F, _F, _P, _P, _P, _I],
    "hadal_mhc_write": [_P, _P, _I, _L, _L, _L, _P, _P, _P, _I],
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the library; None where the package was installed without a C compiler."""
    path = Path(__file__).parent / "libhadal_cpu.so"
    if not path.exists():
        return None
    found = ctypes.CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        getattr(found, name).argtypes = arguments
    return found


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """Return the library where kernels may compute with x; None where the modules have to.

    That is with gradients, on other devices, in other dtypes than float32 and bfloat16, and where kernels are left out.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or not is_on():
        return None
    return None if torch.is_grad_enabled() and x.requires_grad else library()


@cache
def level() -> int:
    """Return which of `LEVELS` is used: the best of this processor, or what $HADAL_CPU_KERNELS names.

    Raises:
        ConfigError: It names none, or one that this processor cannot do.
    """
    found = library()
    assert found is not None
    best = found.hadal_level()
    wanted = os.environ.get("HADAL_CPU_KERNELS", LEVELS[best])
    if wanted not in LEVELS[: best + 1]:
        raise ConfigError(
            f"HADAL_CPU_KERNELS: expected {' or '.join(LEVELS[: best + 1])}, got {wanted!r}"
        )
    return LEVELS.index(wanted)

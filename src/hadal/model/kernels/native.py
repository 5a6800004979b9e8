"""The library of native/, in C, without headers or symbols of torch: called with addresses and sizes."""

import ctypes
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hadal.errors import ConfigError
from hadal.model.kernels.switch import is_on

__all__ = ["LANES", "LEVELS", "call", "has_kernel", "level", "library"]

LEVELS = ("plain", "avx2", "avx512", "bf16")
"""Forms of the kernels, as the library numbers them."""
LANES = 16
"""Partial sums of a product; some kernels take only vectors of a multiple of them."""
_DTYPES = (torch.float32, torch.bfloat16)
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_FUNCTIONS = {
    "hadal_product": [_P, _I, _L, _P, _P, _I, _L, _L, _L, _I, _P, _I, _I, _I],
    "hadal_round_rows": [_P, _L, _L, _L],
    "hadal_vectors": [_P, _P, _I, _L, _L, _L, _I, _F, _P, _P, _P, _L, _I, _I, _I, _I],
    "hadal_attend": [
        _P, _P, _I, _L, _L, _L, _P, _L, _L, _P, _P, _L, _L, _I, _L, _P, _P, _L, _P, _I, _I
    ],
    "hadal_choose": [_P, _P, _I, _L, _L, _L, _P, _P, _L, _L, _I, _P, _L, _L, _I, _P, _I, _I],
    "hadal_route": [_P, _I, _L, _P, _I, _L, _L, _P, _P, _P, _L, _F, _P, _P, _I, _I],
    "hadal_experts": [_P, _I, _L, _P, _L, _I, _I, _L, _L, _L, _P, _P, _L, _F, _I, _P, _I, _I],
    "hadal_project": [
        _P, _I, _I, _L, _P, _P, _P, _L, _F, _P, _L, _L, _F, _I, _I, *[_P] * 9, _I, _I
    ],
    "hadal_attention_output": [_P, _I, _I, _L, _P, _P, _L, _P, _L, _L, _P, _P, _I, _I],
    "hadal_feed_forward": [_P, _I, _I, _L, _P, _P, _L, _L, _F, _F, _P, _I, _I],
    "hadal_pool": [_P, _P, _P, _P, _L, _L, _L, _P, _I, _I],
    "hadal_decode": [_P, _I, _L, _P, _P, _L, _P, _P, _P, _I, _I],
    "hadal_swiglu": [_P, _P, _I, _L, _L, _F, _P, _P, _I, _I],
    "hadal_mhc_read": [_P, _I, _L, _L, _L, _P, _P, _P, _I, _F, _F, _P, _P, _P, _I, _I],
    "hadal_mhc_write": [_P, _P, _I, _L, _L, _L, _P, _P, _I, _I],
    "hadal_share_threads": [_P],
}  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the library; None where the package was installed without a C compiler."""
    path = Path(__file__).parent / "libhadal_cpu.so"
    if not path.exists():
        return None
    found = ctypes.CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        getattr(found, name).argtypes = arguments
    if (region := _parallel_region()) is not None:
        found.hadal_share_threads(ctypes.cast(region, ctypes.c_void_p))
    return found


def _parallel_region() -> Any:
    """Return `GOMP_parallel` of the library whose threads torch uses; without it kernels run on one thread."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libgomp", "libiomp", "libomp")) and path.exists():
            return getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
    return None


def has_kernel(*tensors: Tensor | None) -> bool:
    """Return whether kernels may compute with these tensors; where they may not the modules do.

    That is with gradients, on other devices, in other dtypes than float32 and bfloat16, and where kernels are left out.
    """
    if not is_on() or library() is None:
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
            return False
        if recording and tensor.requires_grad:
            return False
    return True


def call(name: str, *arguments: object, at: int | None = None) -> None:
    """Call a function of the library, with the level and the threads as its last arguments.

    Raises:
        MemoryError: There was not enough.
    """
    found = library()
    assert found is not None
    if getattr(found, name)(*arguments, level() if at is None else at, torch.get_num_threads()):
        raise MemoryError(f"{name}: no memory for what it works with")


@cache
def level() -> int:
    """Return which of `LEVELS` is used: the fastest on this processor, or what $HADAL_CPU_KERNELS names.

    Levels of vectors have the same bits. Instructions for bfloat16 are slower than others on some processors that have
    them, and several times as fast on others, so both are tried, for some milliseconds.

    Raises:
        ConfigError: It names none, or one that this processor cannot do.
    """
    found = library()
    assert found is not None
    best = found.hadal_level()
    wanted = os.environ.get("HADAL_CPU_KERNELS")
    if wanted is None:
        return 2 if best == 3 and _seconds(3) > 0.9 * _seconds(2) else best
    if wanted not in LEVELS[: best + 1]:
        raise ConfigError(
            f"HADAL_CPU_KERNELS: expected {' or '.join(LEVELS[: best + 1])}, got {wanted!r}"
        )
    return LEVELS.index(wanted)


def _seconds(at: int) -> float:
    """Return what a product of bfloat16 takes at a level, at best; large enough that multiplying is most of it."""
    x, weight, y = (torch.ones(512, 512, dtype=torch.bfloat16) for _ in range(3))
    given = (x.data_ptr(), True, 512, weight.data_ptr(), None, 1, 512, 512, 1, False, y.data_ptr())
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        call("hadal_product", *given, True, at=at)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

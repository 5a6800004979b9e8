"""Products with stored matrices on the processor: native/stored_product.c."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from hadal.model.kernels.native import level, library_for

__all__ = ["stored_product"]

_LANES, _OUTPUTS = 16, 4
_FP8, _FP8_FLOAT_SCALES, _FP4 = range(3)
_FLOPS_FOR_ANOTHER_THREAD = 4e6
"""Of a part, so that it is worth handing over: some tenths of a millisecond."""


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hadal-kernels")


def stored_product(
    x: Tensor, codes: Tensor, scale: Tensor, *, rounds: bool = False, groups: int = 1, at: int | None = None
) -> Tensor | None:  # fmt: skip
    """Return `x W^T`, W as it is stored; None where there is no kernel for that.

    Summed in float32 and rounded once. The sum of one output has one order, whatever it is computed beside.

    Args:
        x: [T, G I] float32 or bfloat16.
        codes: [O, I] float8_e4m3fn, or int8 [O, I/2] with two FP4 codes a byte.
        scale: Of tiles or blocks, float8_e8m0fnu; float32 of tiles, too.
        rounds: Whether x is rounded to E4M3 first, as `quant.round_trip_activations` does.
        groups: G: columns of x and rows of W come in so many, each for itself.
        at: Which of `native.LEVELS`. Default: the best.
    """
    found = library_for(x)
    if found is None or x.dim() != 2:
        return None
    codes, scale = codes.contiguous(), scale.contiguous()
    form = _FP4 if codes.dtype == torch.int8 else _FP8
    if scale.dtype == torch.float32:
        form = _FP8_FLOAT_SCALES
    inner, outer = x.shape[1] // groups, codes.shape[0]
    given = _inputs(found, x.float().reshape(-1, inner), rounds=rounds)
    rows, width = x.shape[0], given.shape[1]
    y = x.new_empty((rows, outer), dtype=torch.float32)
    best = level() if at is None else at

    def part(first: int, last: int) -> int:
        group = first * groups // outer
        return found.hadal_stored_product(
            given.data_ptr() + 4 * group * width, rows, groups * width, width, codes.data_ptr(), scale.data_ptr(), form,
            inner, outer, first, last, y.data_ptr(), best,
        )  # fmt: skip

    wanted = int(2 * rows * inner * outer / _FLOPS_FOR_ANOTHER_THREAD)
    if _share(part, outer, groups, min(torch.get_num_threads(), wanted)):
        raise MemoryError(f"no memory for {width} columns of a matrix")
    return y.to(x.dtype)


def _inputs(found: ctypes.CDLL, x: Tensor, *, rounds: bool) -> Tensor:
    """Return rows with zeros up to a multiple of the lanes, rounded if asked to."""
    x = x.contiguous()
    rows, inner = x.shape
    width = -(-inner // _LANES) * _LANES
    if width == inner and not rounds:
        return x
    given = x.new_zeros((rows, width)) if width != inner else torch.empty_like(x)
    found.hadal_round_inputs(x.data_ptr(), rows, inner, given.data_ptr(), width, int(rounds))
    return given


def _share(part: Callable[[int, int], int], outer: int, groups: int, threads: int) -> bool:
    """Compute all outputs, in threads if there are several; return whether some part has failed."""
    size = outer // groups
    parts = [(size * n, size * (n + 1)) for n in range(groups)]
    if groups == 1 and threads > 1:
        ends = [outer * n // threads // _OUTPUTS * _OUTPUTS for n in range(threads)]
        parts = list(pairwise([*ends, outer]))
    if threads <= 1:
        results = [part(*one) for one in parts]
    else:
        others = [_pool(threads - 1).submit(part, *one) for one in parts[1:]]
        results = [part(*parts[0]), *(other.result() for other in others)]
    return any(results)

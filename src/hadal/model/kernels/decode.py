"""A run of layers for sequences that have one new token each, in one call: native/decode.h."""

import contextlib
import struct
from array import array
from collections.abc import Generator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from hadal.model.kernels.attention import Pages
from hadal.model.kernels.native import call

__all__ = ["PARTS", "SPAN_TOKENS", "decode_layers", "float_bits", "store_numbers", "timed_parts"]

SPAN_TOKENS = 128
"""Tokens whose rotations a sequence has at hand: those after a multiple of it."""
PARTS = ("projections", "entries", "index", "attention", "output", "experts")
"""Of a layer, as the enum `part` of native/decode.h; hyper-connections are with what they read for or write."""
_NO_PAGES = (0, 0, 1, 1, 0)
_SPENT: ContextVar["array[float] | None"] = ContextVar("hadal_decode_spent", default=None)


def float_bits(*values: float) -> list[int]:
    """Return floats as tables have them."""
    return list(struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values)))


def store_numbers(pages: Pages | None) -> tuple[int, ...]:
    """Return where entries, or index keys, lie; None for none."""
    return _NO_PAGES if pages is None else pages.arguments()


def decode_layers(
    streams_TMD: Tensor, ids_T: Tensor, tables: Tensor, sequences: Sequence[int]
) -> Tensor:
    """Return the streams behind the layers.

    Args:
        streams_TMD: Those before them, float32 or bfloat16.
        ids_T: int64, of the tokens.
        tables: [L, 4] addresses: of a layer's numbers, as the enum `layer_number` has them, and of its matrices before
            the softmax, behind it, and of the experts.
        sequences: Of each token its sequence, as the enum `sequence_number` has it.
    """
    given, spent = array("q", sequences), _SPENT.get()
    out = torch.empty_like(streams_TMD)
    call(
        "hadal_decode", streams_TMD.data_ptr(), streams_TMD.dtype == torch.bfloat16, streams_TMD.shape[0],
        ids_T.data_ptr(), tables.data_ptr(), tables.shape[0], given.buffer_info()[0], out.data_ptr(),
        None if spent is None else spent.buffer_info()[0],
    )  # fmt: skip
    return out


@contextlib.contextmanager
def timed_parts() -> Generator["array[float]"]:
    """Add up, in a block, the seconds that `PARTS` take in steps of one token a sequence."""
    spent = array("d", [0.0] * len(PARTS))
    token = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(token)

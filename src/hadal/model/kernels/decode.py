"""A run of layers for sequences that have one new token each, in one call: native/decode.h."""

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hadal.model.kernels.attention import Pages
from hadal.model.kernels.native import call

__all__ = ["SPAN_TOKENS", "decode_layers", "float_bits", "store_numbers"]

SPAN_TOKENS = 128
"""Tokens whose rotations a sequence has at hand: those after a multiple of it."""
_NO_PAGES = (0, 0, 1, 1, 0)


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
    given = array("q", sequences)
    out = torch.empty_like(streams_TMD)
    call(
        "hadal_decode", streams_TMD.data_ptr(), streams_TMD.dtype == torch.bfloat16, streams_TMD.shape[0],
        ids_T.data_ptr(), tables.data_ptr(), tables.shape[0], given.buffer_info()[0], out.data_ptr(),
    )  # fmt: skip
    return out

"""A layer for sequences that have one new token each, in two calls: native/block.h."""

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hadal.model.kernels.attention import Pages
from hadal.model.kernels.native import call

__all__ = ["NOWHERE", "Room", "begin_block", "end_block", "float_bits", "seen_entries"]

NOWHERE = [0, 0]
"""Addresses of what a layer does not have."""
_NO_PAGES = (0, 0, 1, 1, 0)


def float_bits(*values: float) -> list[int]:
    """Return floats as tables have them."""
    return list(struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values)))


def seen_entries(pages: Pages | None) -> tuple[int, ...]:
    """Return where entries, or index keys, lie that are looked at; None for none."""
    return _NO_PAGES if pages is None else pages.arguments()


class Room:
    """What the first call of a layer leaves for the second.

    Args:
        like: [T, M, D] streams.
        heads: Numbers of a token's query.
        mixing: Coefficients of a site.
        index: Heads and columns of an index query; 0 and 0 where there is no indexer.
    """

    def __init__(self, like: Tensor, heads: int, mixing: int, index: tuple[int, int]) -> None:
        tokens = like.shape[0]
        self.query = like.new_empty((tokens, heads))
        self.mix = torch.empty((tokens, mixing))
        self.index_query = like.new_empty((tokens, *index)) if index[0] else None
        self.index_weight = like.new_empty((tokens, index[0])) if index[0] else None

    def addresses(self) -> tuple[int, int, int, int]:
        """Return where its parts lie."""
        index = (self.index_query, self.index_weight)
        rest = [0 if part is None else part.data_ptr() for part in index]
        return self.mix.data_ptr(), self.query.data_ptr(), rest[0], rest[1]


def begin_block(
    streams_TMD: Tensor, positions_T: Tensor, rotation: tuple[Tensor, Tensor], layer: Tensor, before: Tensor,
    room: Room, places: Sequence[int],
) -> None:  # fmt: skip
    """Compute what attention needs of each token, and write what its cache keeps.

    Args:
        streams_TMD: float32 or bfloat16.
        positions_T: Of the tokens.
        rotation: Cosines and sines of these.
        layer: Numbers of the layer, as the enum `layer_number` of native/block.h has them.
        before: Matrices before the softmax.
        room: For what the second call needs.
        places: For each token five addresses: of window key, keys and logits of compressor and indexer; 0 for none.
    """
    given = array("q", places)
    call(
        "hadal_block_begin", streams_TMD.data_ptr(), streams_TMD.dtype == torch.bfloat16, streams_TMD.shape[0],
        positions_T.data_ptr(), rotation[0].data_ptr(), rotation[1].data_ptr(), layer.data_ptr(), before.data_ptr(),
        *room.addresses(), given.buffer_info()[0],
    )  # fmt: skip


def end_block(
    streams_TMD: Tensor, ids_T: Tensor, rotation: tuple[Tensor, Tensor], layer: Tensor, after: Tensor, feed: Tensor,
    room: Room, seen: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return the streams behind the layer.

    Args:
        streams_TMD: Those before it.
        ids_T: int64, of the tokens.
        rotation: As for the first call, as is
        layer: and
        room: too.
        after: Matrices behind the softmax.
        feed: Gate and experts.
        seen: For each token where its window begins, how many keys are in it before its own, how many entries it may see,
            and, five numbers each, entries and the index keys that it has to choose by.
    """
    given = array("q", seen)
    out = torch.empty_like(streams_TMD)
    call(
        "hadal_block_end", streams_TMD.data_ptr(), streams_TMD.dtype == torch.bfloat16, streams_TMD.shape[0],
        ids_T.data_ptr(), rotation[0].data_ptr(), rotation[1].data_ptr(), layer.data_ptr(), after.data_ptr(),
        feed.data_ptr(), *room.addresses(), given.buffer_info()[0], out.data_ptr(),
    )  # fmt: skip
    return out

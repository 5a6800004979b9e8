"""Drills: samples in which everything that is learned stands somewhere before, near or far.

Conversations alone teach a network to look around in its window, where nearly all that they need is. What a
drill asks for is, as often as not, only in compressed entries.
"""

import random
from collections.abc import Sequence

from hadal.train.tokens import Tokens

__all__ = ["drill"]

_SHORTEST = 16
"""Tokens of a text."""
_CUE = 2
"""Tokens of a piece that are given."""


def drill(draw: random.Random, ids: Sequence[int], length: int) -> Tokens:
    """Return texts of random tokens, each followed by other tokens and then by its pieces in another order.

    The beginning of a piece says which one it is; the rest of it is learned.

    Args:
        draw: Of everything.
        ids: Tokens that may be in it.
        length: Tokens in all.
    """
    made = Tokens([], [])
    while len(made.ids) < length:
        size = _log_uniform(draw, _SHORTEST, max(_SHORTEST, length // 2))
        pieces = _facts(draw, ids, size) if draw.random() < 0.5 else _texts(draw, ids, size)
        for piece in pieces:
            made.add(piece, said=False)
        made.add(draw.choices(ids, k=_log_uniform(draw, 1, max(1, length // 4))), said=False)
        draw.shuffle(pieces)
        for piece in pieces:
            made.add(piece[:_CUE], said=False)
            made.add(piece[_CUE:], said=True)
    return Tokens(made.ids[:length], made.said[:length])


def _log_uniform(draw: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** draw.random())


def _texts(draw: random.Random, ids: Sequence[int], size: int) -> list[list[int]]:
    """Return pieces of any tokens, of a few to some dozens each."""
    pieces: list[list[int]] = []
    while size > 0:
        pieces.append(draw.choices(ids, k=_log_uniform(draw, _CUE + 2, 32)))
        size -= len(pieces[-1])
    return pieces


def _facts(draw: random.Random, ids: Sequence[int], size: int) -> list[list[int]]:
    """Return names with values of few different tokens, so that only the name says which value it is."""
    few = draw.choices(ids, k=10)
    pieces: list[list[int]] = []
    while size > 0:
        pieces.append([*draw.choices(ids, k=_CUE), *draw.choices(few, k=draw.randint(2, 6))])
        size -= len(pieces[-1])
    return pieces

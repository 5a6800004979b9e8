"""Text of a completion that comes in pieces, as the token ids that it spells."""

from functools import lru_cache

from hadal.backends.backend import Chunk
from hadal.encoding import Tokenizer

__all__ = ["TextPieces"]


class TextPieces:
    """Makes chunks of pieces of text; a control token may be cut in two by them.

    Pieces that end with what may be the beginning of one wait for the next.

    Args:
        tokenizer: Whose control tokens are looked for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._beginnings, self._longest = _beginnings(tokenizer)
        self._waiting: list[str] = []

    def add(self, piece: str) -> list[Chunk]:
        """Return what is certain with one more piece: a chunk, or none."""
        if piece:
            self._waiting.append(piece)
        return [] if self._is_open("".join(self._waiting)) else self.rest()

    def rest(self) -> list[Chunk]:
        """Return what waits, now that nothing follows it: a chunk, or none."""
        pieces, self._waiting = self._waiting, []
        text = "".join(pieces)
        return [Chunk(tuple(self._ids(pieces, text)), text.encode())] if text else []

    def _ids(self, pieces: list[str], text: str) -> list[int]:
        """Encode each piece alone, as it is likely a token that was said; together only if that spells others."""
        alone = [i for piece in pieces for i in self._tokenizer.encode_raw(piece)]
        if len(pieces) == 1:
            return alone
        together = self._tokenizer.encode_raw(text)
        control = set(self._tokenizer.added.values())
        same = [i for i in alone if i in control] == [i for i in together if i in control]
        return alone if same else together

    def _is_open(self, text: str) -> bool:
        """Return whether a control token may have begun that ends in what follows."""
        tail = text[-self._longest :]
        return any(tail[at:] in self._beginnings for at in range(len(tail)))


@lru_cache(maxsize=4)
def _beginnings(tokenizer: Tokenizer) -> tuple[frozenset[str], int]:
    """Return every text that a control token begins with, and the length of the longest."""
    found = frozenset(token[:n] for token in tokenizer.added for n in range(1, len(token)))
    return found, max(map(len, found), default=0)

"""Text to token ids and back, with control tokens and text kept apart.

Tokenising a finished prompt in one pass lets text spell control tokens; tokenising it message by
message splits tokens that span two pieces. Here adjacent texts are joined, whoever they came from,
each run is encoded with the added tokens switched off, and the ids of control tokens go between.
On benign text that gives exactly the ids of one pass.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from hadal.encoding.tokens import Control
from hadal.errors import CheckpointError, EncodingError

__all__ = ["Tokenizer"]


class Tokenizer:
    """A checkpoint's `tokenizer.json`, read by the `tokenizers` library.

    Attributes:
        added: Ids of all added tokens, by spelling.
    """

    def __init__(self, path: str | Path) -> None:
        """Load the file.

        Args:
            path: `tokenizer.json`, or a folder that holds it.

        Raises:
            CheckpointError: It is missing, or not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            definition: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            added: list[dict[str, Any]] = definition.pop("added_tokens")
            self.added: dict[str, int] = {token["content"]: token["id"] for token in added}
            # Without added tokens in the file there is nothing that text could turn into.
            self._plain = HFTokenizer.from_str(json.dumps({**definition, "added_tokens": []}))
        except OSError as err:
            raise CheckpointError(
                f"cannot read the tokenizer {file}: {err.strerror}",
                hint="give the checkpoint's folder or its tokenizer.json",
            ) from err
        except Exception as err:
            raise CheckpointError(
                f"not a tokenizer file: {file}: {type(err).__name__}: {str(err)[:200]}"
            ) from err
        self.path = file

    def control_id(self, token: str) -> int:
        """The id of a control token.

        Raises:
            EncodingError: This tokenizer does not have it.
        """
        try:
            return self.added[token]
        except KeyError:
            raise EncodingError(
                f"the tokenizer {self.path} has no token {token}",
                hint="the tokenizer and the generation of the format do not fit together",
            ) from None

    def encode_items(self, items: Iterable[str]) -> list[int]:
        """Encode a rendered prompt: `Control` items as ids, the text between them run by run.

        Raises:
            EncodingError: A control token that the tokenizer lacks, or text that has no UTF-8.
        """
        runs: list[str] = []  # distinct, in order of appearance
        run_of: dict[str, int] = {}
        plan: list[int] = []  # >= 0: a control id; < 0: the run ~x
        for is_control, text in _runs(items):
            if is_control:
                plan.append(self.control_id(text))
            else:
                index = run_of.setdefault(text, len(runs))
                if index == len(runs):
                    runs.append(text)
                plan.append(~index)
        encoded = self._encode_runs(runs)
        ids: list[int] = []
        for step in plan:
            if step >= 0:
                ids.append(step)
            else:
                ids += encoded[~step]
        return ids

    def _encode_runs(self, runs: list[str]) -> list[list[int]]:
        try:
            batch = self._plain.encode_batch_fast(runs, add_special_tokens=False)
        except TypeError as err:  # the library's words for it: "TextInputSequence must be str"
            raise EncodingError(
                "text has no UTF-8: it holds half of a surrogate pair",
                hint="decode with errors='replace' before it gets here",
            ) from err
        return [encoding.ids for encoding in batch]

    def encode_text(self, text: str) -> list[int]:
        """Encode text as text: whatever it spells, no control token comes out.

        Raises:
            EncodingError: It has no UTF-8.
        """
        return self._encode_runs([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids; a token may end within a character.

        Raises:
            EncodingError: An id that the tokenizer does not have.
        """
        table = self._bytes_of
        try:
            return b"".join([table[i] for i in ids])
        except KeyError as err:
            raise EncodingError(
                f"unknown token id {err.args[0]}: expected 0 to {max(table)}"
            ) from None

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        from_char = {char: byte for byte, char in enumerate(_byte_characters())}
        table: dict[int, bytes] = {}
        for token, i in self._plain.get_vocab(with_added_tokens=False).items():
            if token not in self.added:
                table[i] = bytes([from_char[char] for char in token])
        table |= {i: token.encode() for token, i in self.added.items()}
        return table


def _runs(items: Iterable[str]) -> Iterable[tuple[bool, str]]:
    pending: list[str] = []
    for item in items:
        if isinstance(item, Control):
            if pending:
                yield False, "".join(pending)
                pending.clear()
            yield True, item
        elif item:
            pending.append(item)
    if pending:
        yield False, "".join(pending)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's mapping).

    Printable Latin-1 stands for itself; the others are numbered from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(0x100)]

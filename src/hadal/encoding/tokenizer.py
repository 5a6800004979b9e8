"""Text to token ids and back, with control tokens and text kept apart.

Tokenising a finished prompt in one pass lets text spell control tokens; tokenising it message by
message splits tokens that span two pieces. Here adjacent texts are joined, whoever they came from,
each run is encoded with the added tokens switched off, and the ids of control tokens go between.
On benign text that gives exactly the ids of one pass.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
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
            self._ascii = _ascii_twin(self._plain, definition)
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
        ascii_runs = [run for run in runs if run.isascii()]
        other_runs = [run for run in runs if not run.isascii()]
        try:
            ascii_ids = iter(_batch(self._ascii, ascii_runs))
            other_ids = iter(_batch(self._plain, other_runs))
        except TypeError as err:  # the library's words for it: "TextInputSequence must be str"
            raise EncodingError(
                "text has no UTF-8: it holds half of a surrogate pair",
                hint="decode with errors='replace' before it gets here",
            ) from err
        return [next(ascii_ids if run.isascii() else other_ids) for run in runs]

    def encode_text(self, text: str) -> list[int]:
        """Encode text as text: whatever it spells, no control token comes out.

        Raises:
            EncodingError: It has no UTF-8.
        """
        return self._encode_runs([text])[0]

    @cached_property
    def _spelled(self) -> re.Pattern[str] | None:
        """The control tokens in a text, the longest first."""
        names = sorted(self.added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def encode_raw(self, text: str) -> list[int]:
        """Encode a prompt that spells its control tokens, as a raw completions route takes it.

        Never for text from users: whoever writes it can write any turn.

        Raises:
            EncodingError: It has no UTF-8.
        """
        pieces = self._spelled.split(text) if self._spelled else [text]
        return self.encode_items([Control(p) if i % 2 else p for i, p in enumerate(pieces) if p])

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

    def bytes_or_none(self, token_id: int) -> bytes | None:
        """The exact bytes of an id; None if the tokenizer does not have it."""
        return self._bytes_of.get(token_id)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        from_char = {char: byte for byte, char in enumerate(_byte_characters())}
        table: dict[int, bytes] = {}
        for token, i in self._plain.get_vocab(with_added_tokens=False).items():
            if token not in self.added:
                table[i] = bytes([from_char[char] for char in token])
        table |= {i: token.encode() for token, i in self.added.items()}
        return table


def _batch(tokenizer: HFTokenizer, runs: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch_fast(runs, add_special_tokens=False)]


_ASCII_CLASSES = (
    (r"\p{L}\p{M}", "A-Za-z"),
    (r"\p{L}", "A-Za-z"),
    (r"\p{P}\p{S}", r"!-/:-@\[-`{-~"),
    (r"\p{N}", "[0-9]"),
)
"""What the Unicode classes of the split patterns come to on ASCII."""

_NO_ASCII = re.compile(r"\[(?:[^\x00-\x7f]-[^\x00-\x7f])+\]\+")
"""A split pattern that cannot match ASCII."""


_PROBE = "".join(
    f"{first}{second}" for first in map(chr, range(128)) for second in map(chr, range(128))
)
"""Every two ASCII characters beside each other."""


def _ascii_twin(plain: HFTokenizer, definition: dict[str, Any]) -> HFTokenizer:
    """The same tokenizer for ASCII text, with split patterns that are cheaper to match.

    Splitting is half of the cost, and nearly all text of an agent is ASCII. The twin shares the
    vocabulary; where a pattern is not one that we know, it is `plain` itself.
    """
    steps: list[Any] = []
    for step in (definition.get("pre_tokenizer") or {}).get("pretokenizers", ()):
        pattern: str = step.get("pattern", {}).get("Regex", "")
        if _NO_ASCII.fullmatch(pattern):
            continue
        for unicode_class, ascii_class in _ASCII_CLASSES:
            pattern = pattern.replace(unicode_class, ascii_class)
        if step["type"] == "Split" and pattern and r"\p" not in pattern:
            steps.append(pre_tokenizers.Split(Regex(pattern), step["behavior"].lower()))
        elif step["type"] == "ByteLevel" and not step["use_regex"]:
            prefix = step["add_prefix_space"]
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False))
        else:
            return plain
    normalizer: dict[str, Any] | None = definition.get("normalizer")
    if not steps or (normalizer is not None and normalizer.get("normalizers") != []):
        return plain
    twin = HFTokenizer(plain.model)
    twin.pre_tokenizer = pre_tokenizers.Sequence(steps)
    split, split_plain = twin.pre_tokenizer, plain.pre_tokenizer
    alike = split.pre_tokenize_str(_PROBE) == split_plain.pre_tokenize_str(_PROBE)
    return twin if alike else plain


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

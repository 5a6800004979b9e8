"""A byte-level BPE with the control tokens of V4 under their own spellings."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hadal.encoding.tokens import (
    ACTION,
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)
from hadal.errors import ConfigError

__all__ = ["train_tokenizer", "vocabulary_size"]

_CONTROLS = (
    BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER, EXTRACTED_URL,
    *dict.fromkeys((ACTION, *TASKS.values())),
)  # fmt: skip
_MARKUP = (
    "</?tool_result>",
    r'(?:invoke|parameter)(?: [a-z]+="[^"\n]*")*>\n?(?:</?)?',
    r"tool_calls>\n?(?:</?)?",
)
"""What stands between control tokens in a call: a token each, so that a call is short."""
_SPLITS = (r"[\p{N}]", "|".join((*_MARKUP, r"[\p{L}]+", r"[^\s\p{L}\p{N}]+", r"\s+")))
"""Digits stand alone, so that numbers are copied digit by digit; a word is the same tokens
wherever it stands, so that it can be copied."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learn merges from texts and write a `tokenizer.json`.

    Args:
        texts: Without control tokens.
        vocab_size: Tokens in all, the control tokens first.
        path: Where it goes; it appears when it is complete.
    """
    tokenizer = Tokenizer(models.BPE())
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[str(c) for c in _CONTROLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tokenizer.save(str(partial))
    partial.rename(path)


def vocabulary_size(path: Path) -> int:
    """Return how many tokens a `tokenizer.json` has, control tokens included.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"cannot read the tokenizer {path}: {error}") from error

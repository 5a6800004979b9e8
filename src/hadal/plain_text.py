"""Text of models, guests and images on a terminal: nothing in it steers the terminal."""

import unicodedata

__all__ = ["one_line", "visible"]


def visible(text: str) -> str:
    """Return text with its lines and tabs, and all else that is no character to look at escaped.

    That is Unicode's category C: control characters, with which a terminal is steered and its window's title or
    clipboard written; directions of writing, which show a command as another; lone surrogates.
    """
    return "".join(c if c in "\n\t" else _shown(c) for c in text)


def one_line(text: str, limit: int = 200) -> str:
    """Return text on one line, and not endless.

    Args:
        text: Of which nothing steers the terminal.
        limit: Characters at most.
    """
    shown = "".join(map(_shown, text[: limit + 1]))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _shown(character: str) -> str:
    if not unicodedata.category(character).startswith("C"):
        return character
    return character.encode("unicode_escape").decode("ascii")

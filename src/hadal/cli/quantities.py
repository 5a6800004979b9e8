"""Token counts, sizes, durations and pairs as people write them."""

import re
from collections.abc import Iterable, Sequence

from cyclopts import Token

from hadal.errors import ConfigError

__all__ = [
    "human_bytes",
    "human_count",
    "human_seconds",
    "parse_bytes",
    "parse_seconds",
    "parse_token_list",
    "parse_tokens",
    "read_pairs",
]

_MOST = 1e12
_FACTORS = {"": 1, "k": 1024, "m": 1024**2}
_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_tokens(_: type, tokens: Sequence[Token]) -> int:
    """Read a token count; K and M are binary, as context windows are.

    Raises:
        ValueError: It is none.
    """
    return _token_count(tokens[0].value.replace(",", ""))


def parse_token_list(_: type, tokens: Sequence[Token]) -> list[int]:
    """Read token counts with commas between them.

    Raises:
        ValueError: One of them is none.
    """
    return [_token_count(part) for token in tokens for part in token.value.split(",")]


def _token_count(text: str) -> int:
    text = text.replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([km]?)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a token count such as 4096, 128K, 1M or 1e6, got {text!r}")
    number, suffix = match.groups()
    value = float(number) * _FACTORS[suffix.lower()]
    if value > _MOST:
        raise ValueError(f"expected at most {_MOST:,.0f} tokens, got {text!r:.40}")
    return int(value)


def human_count(number: float) -> str:
    """Return a count with a metric suffix."""
    for factor, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:,.2f}{suffix}"
    return f"{number:,.0f}"


def human_bytes(number: float) -> str:
    """Return bytes with a decimal unit."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number:,.2f} B" if number % 1 else f"{number:,.0f} B"


def parse_bytes(_: type, tokens: Sequence[Token]) -> int:
    """Read a size: 8GiB and 8G are binary, 8GB is decimal.

    Raises:
        ValueError: It is none.
    """
    text = tokens[0].value.replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a size such as 8GiB, 500MB or 1048576, got {text!r:.40}")
    number, prefix, unit = match.groups()
    base = 1000 if prefix and unit.lower() == "b" else 1024
    return int(float(number) * base ** " kmgt".index(prefix.lower() or " "))


def parse_seconds(_: type, tokens: Sequence[Token]) -> float:
    """Read a duration: 90, 90s, 1.5h, 2d.

    Raises:
        ValueError: It is none.
    """
    text = tokens[0].value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a duration such as 90, 90s, 15m, 2h or 1d, got {text!r:.40}")
    return float(match[1]) * _UNITS_S[match[2].lower()]


def human_seconds(seconds: float) -> str:
    """Return a duration with one unit."""
    for factor, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def read_pairs(option: str, values: Iterable[str]) -> dict[str, str]:
    """Read NAME=VALUE pairs.

    Raises:
        ConfigError: One has no name or no =.
    """
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"{option}: expected NAME=VALUE, got {text!r:.80}")
        pairs[name] = value
    return pairs

"""`--mode` and `--effort`: how a model is to think, in the words of the format or in those of the report."""

from typing import Literal

from hadal.errors import ConfigError

__all__ = ["Mode", "PromptMode", "thinking"]

PromptMode = Literal["thinking", "chat"]
Mode = Literal["thinking", "chat", "non-think", "think-high", "think-max"]
_OF_THE_REPORT: dict[str, tuple[PromptMode, str | None]] = {
    "non-think": ("chat", None),
    "think-high": ("thinking", "high"),
    "think-max": ("thinking", "max"),
}


def thinking(mode: Mode, effort: str | None) -> tuple[PromptMode, str | int | None]:
    """Return mode and effort as the format has them.

    The report's three modes (Table 2) are a mode and an effort at once.

    Args:
        mode: Of the format, or of the report.
        effort: By the generation's table; digits are a number from 1 to 100, which v4.1 has.

    Raises:
        ConfigError: An effort beside a mode that has one.
    """
    if mode in ("thinking", "chat"):
        return mode, int(effort) if effort is not None and effort.isdecimal() else effort
    if effort is not None:
        raise ConfigError(
            f"expected no --effort with --mode {mode}, got {effort!r}",
            hint=f"--mode thinking --effort {effort}",
        )
    return _OF_THE_REPORT[mode]

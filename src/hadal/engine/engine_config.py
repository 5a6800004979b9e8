"""Settings of an engine: limits, memory, what the cache keeps. Names are vLLM's where there is one."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal

from hadal.engine.block_pool import BLOCK_TOKENS
from hadal.engine.storage_format import STORAGE_FORMATS
from hadal.errors import ConfigError

__all__ = ["EngineConfig", "WindowPolicy"]

WindowPolicy = Literal["all", "periodic", "none"]
"""Which windows are kept for reuse (report 3.5.3): at every block; every `checkpoint_interval` tokens
and at the ends of prompts and answers; nowhere, so that a hit runs the last `window x layers` tokens
again."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine serves.

    Attributes:
        max_num_seqs: Requests that are worked on at a time.
        max_num_batched_tokens: Tokens of one step, all requests together.
        max_model_len: Longest prompt and completion together; None for what the model and the cache
            allow.
        cache_bytes: Memory for blocks; None for a quarter of what is free.
        cache_format: `fp32`, `bf16`, `fp8-fp4`, or `auto` for the narrowest that is exact.
        prefix_caching: Reuse what requests have in common.
        window_policy: See `WindowPolicy`.
        checkpoint_interval: Tokens between two checkpoints of a long prompt.
        checkpoint_bytes: Memory for checkpoints; the least recently used go first.
        disk_path: Folder that keeps blocks and checkpoints beyond memory and restarts; None for none.
        disk_bytes: What it may take.
        num_speculative_tokens: Tokens that multi-token prediction proposes at a time; 0 for none.
        seed: Of requests that bring none.
        weight_version: Name of the weights; part of every cache key.
        tensor_parallel_size: Processes that divide the weights and the work among them.
        step_log: File that records every step, for `hadal replay`; it holds every prompt.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    cache_bytes: int | None = None
    cache_format: str = "auto"
    prefix_caching: bool = True
    window_policy: WindowPolicy = "periodic"
    checkpoint_interval: int = 4096
    checkpoint_bytes: int = 1 << 30
    disk_path: Path | None = None
    disk_bytes: int = 16 << 30
    num_speculative_tokens: int = 0
    seed: int = 0
    weight_version: str = "default"
    tensor_parallel_size: int = 1
    step_log: Path | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: A value of the wrong type or out of range.
        """
        for name in ("disk_path", "step_log"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value))
        assert {f.name for f in fields(self)} >= set(_CHECKS)
        for name, (fits, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not fits(value):
                raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _at_least(low: int) -> Callable[[object], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low


_CHECKS: Final[dict[str, tuple[Callable[[object], bool], str]]] = {
    "max_num_seqs": (_at_least(1), "a whole number from 1"),
    "max_num_batched_tokens": (_at_least(1), "a whole number from 1"),
    "max_model_len": (lambda v: v is None or _at_least(1)(v), "a whole number from 1, or None"),
    "cache_bytes": (lambda v: v is None or _at_least(1)(v), "a number of bytes, or None"),
    "cache_format": (
        lambda v: v in (*STORAGE_FORMATS, "auto"),
        f"one of auto, {', '.join(STORAGE_FORMATS)}",
    ),
    "window_policy": (lambda v: v in ("all", "periodic", "none"), "all, periodic or none"),
    "checkpoint_interval": (
        lambda v: _at_least(BLOCK_TOKENS)(v) and v % BLOCK_TOKENS == 0,  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue]
        f"a multiple of {BLOCK_TOKENS}",
    ),
    "checkpoint_bytes": (_at_least(0), "a number of bytes"),
    "disk_bytes": (_at_least(1), "a number of bytes"),
    "tensor_parallel_size": (_at_least(1), "a whole number from 1"),
    "num_speculative_tokens": (_at_least(0), "a whole number from 0"),
    "seed": (_at_least(0), "a whole number from 0"),
}

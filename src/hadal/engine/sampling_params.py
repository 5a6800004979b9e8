"""What a caller may ask of one generation. Names and meanings are vLLM's where there is one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Protocol

from torch import Tensor

from hadal.errors import InputError

__all__ = ["Constraint", "SamplingParams"]


class Constraint(Protocol):
    """Restricts the next token of one generation: the logits-mask seam.

    A constraint has the state of one generation. The engine calls `mask`, then `accept` with the token
    that was chosen, for every position in order; drafted tokens that were wrong never reach it.
    """

    def mask(self, logits_V: Tensor) -> Tensor:
        """Return logits in which every token that may not come next is -inf."""
        ...

    def accept(self, token_id: int) -> None:
        """Take note of the next token."""
        ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of a completion, and when to end it.

    The defaults are the model's recommendation: temperature 1, top_p 1. A result depends on the ids,
    these parameters and the seed, never on what else is being served.

    Attributes:
        max_tokens: Tokens to generate at most; None for as many as the context holds.
        min_tokens: Tokens before any stop condition counts; stop tokens cannot be chosen until then.
        temperature: 0 chooses the most probable token (greedy).
        top_p: Keep the most probable tokens that together reach this probability.
        top_k: Keep this many tokens; 0 or -1 for all.
        min_p: Drop tokens less probable than this share of the most probable one.
        presence_penalty: Subtracted from the logits of tokens that were generated before.
        frequency_penalty: Subtracted once per time that a token was generated before.
        repetition_penalty: Divides (multiplies, if negative) logits of tokens in prompt or output.
        logit_bias: Added to logits, by token id.
        seed: Of this generation; None lets the engine choose, and the completion says which.
        stop: Texts that end the generation; they are cut off the text, not off the ids.
        stop_token_ids: Tokens that end the generation, besides the model's own end.
        ignore_eos: The model's own end does not end the generation.
        logprobs: Report log-probabilities of the chosen token and of this many best ones.
        prompt_logprobs: The same for the tokens of the prompt; switches prefix reuse off for them.
        return_routed_experts: Report the experts that every token was routed to.
        constraint: Makes the mask of a fresh generation.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routed_experts: bool = False
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: A value of the wrong type or out of range.
        """
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        known = {f.name for f in fields(self)}
        assert set(_CHECKS) <= known
        for name, (fits, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not fits(value):
                raise InputError(f"{name}: expected {expected}, got {value!r}")

    @property
    def greedy(self) -> bool:
        """Return whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Return whether earlier tokens change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object, low: float, high: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )


_CHECKS: Final[dict[str, tuple[Callable[[object], bool], str]]] = {
    "max_tokens": (lambda v: v is None or _is_int(v, 0), "a whole number from 0, or None"),
    "min_tokens": (lambda v: _is_int(v, 0), "a whole number from 0"),
    "temperature": (lambda v: _is_number(v, 0, 100), "a number from 0 to 100"),
    "top_p": (lambda v: _is_number(v, 0, 1) and v != 0, "a number above 0, up to 1"),
    "top_k": (lambda v: _is_int(v, -1), "a whole number from 1, or 0 for all"),
    "min_p": (lambda v: _is_number(v, 0, 1), "a number from 0 to 1"),
    "presence_penalty": (lambda v: _is_number(v, -2, 2), "a number from -2 to 2"),
    "frequency_penalty": (lambda v: _is_number(v, -2, 2), "a number from -2 to 2"),
    "repetition_penalty": (lambda v: _is_number(v, 0, 10) and v != 0, "a number above 0, up to 10"),
    "logit_bias": (
        lambda v: isinstance(v, Mapping) and all(_is_number(b, -100, 100) for b in v.values()),
        "token ids with numbers from -100 to 100",
    ),
    "seed": (lambda v: v is None or _is_int(v, -(2**63), 2**64), "a 64-bit number, or None"),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "texts that are not empty",
    ),
    "stop_token_ids": (
        lambda v: isinstance(v, tuple) and all(_is_int(t, 0) for t in v),
        "token ids",
    ),
    "ignore_eos": (lambda v: isinstance(v, bool), "True or False"),
    "logprobs": (lambda v: v is None or _is_int(v, 0), "a whole number from 0, or None"),
    "prompt_logprobs": (lambda v: v is None or _is_int(v, 0), "a whole number from 0, or None"),
    "return_routed_experts": (lambda v: isinstance(v, bool), "True or False"),
}

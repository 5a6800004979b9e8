"""What a generation gives back: tokens, why it ended, and what its prompt cost."""

import enum
from dataclasses import dataclass

from hadal.errors import HadalError

__all__ = ["Completion", "FinishReason", "PrefixUse", "TokenLogprobs", "Update"]


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token or text, or the model's own end."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution (temperature 1).

    Attributes:
        token_id: The token that stands there.
        logprob: Its log-probability.
        rank: How many tokens were at least as probable, itself included.
        top: The most probable tokens with theirs, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class PrefixUse:
    """Where the state of the prompt came from, in tokens; they add up to the prompt.

    Attributes:
        hit: Taken from the cache.
        replayed: Run again only to bring back the sliding window; their entries were read.
        computed: Run for the first time.
        from_disk: Of `hit` and `replayed`, those whose entries had to be read from disk.
        reason: Why no more was hit, in words.
    """

    hit: int = 0
    replayed: int = 0
    computed: int = 0
    from_disk: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished generation.

    Attributes:
        request_id: As given to, or by, the engine.
        prompt_ids: Token ids of the prompt.
        token_ids: Generated token ids, the stop token included.
        finish_reason: Why it ended.
        stop: The stop text or token id that ended it; None otherwise.
        logprobs: One per generated token, if asked for.
        prompt_logprobs: One per prompt token but the first, if asked for.
        routed_experts: If asked for: per token that was run (prompt, then output but the last), per
            layer, the experts chosen.
        prefix: Where the state of the prompt came from.
        seed: Of the sampling.
        weight_version: Of the model that generated it.
        num_preemptions: How often it had to give its memory up.
        drafted: Tokens proposed by multi-token prediction.
        accepted: Of them, those that were right.
        error: What went wrong, with `FinishReason.ERROR`.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    routed_experts: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    prefix: PrefixUse
    seed: int
    weight_version: str
    num_preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    error: HadalError | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one step did for one request.

    Attributes:
        request_id: Which.
        token_ids: New tokens, often one, none during a prefill.
        logprobs: Theirs, if asked for.
        prefill: Prompt tokens done, and in all.
        num_run: Tokens that were run for it, drafts included.
        completion: The whole result, with the last update.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prefill: tuple[int, int] = (0, 0)
    num_run: int = 0
    completion: Completion | None = None

"""Why a run ended, and what came of it."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Ending", "Limits", "Outcome", "StopReason"]


class StopReason(StrEnum):
    """Why a run ended. Nothing ends without one."""

    DONE = "done"
    """The model answered, and the user has nothing more to say."""
    MAX_TURNS = "max_turns"
    """As many turns as it may take."""
    CONTEXT_FULL = "context_full"
    """The window has no room for another turn."""
    ENDLESS_REASONING = "endless_reasoning"
    """It thought until its reply was cut off, again and again."""
    CUT_OFF = "cut_off"
    """Its answer or call was cut off, again and again."""
    MALFORMED = "malformed"
    """What it said could not be read, again and again."""
    EMPTY = "empty"
    """It said nothing, again and again."""
    REPETITION = "repetition"
    """It made the same call with the same result, again and again."""
    MODEL_FAILED = "model_failed"
    """The model could not be asked: our machinery failed, not the agent."""
    SANDBOX_FAILED = "sandbox_failed"
    """The box or its node failed: our machinery, not the agent."""

    @property
    def is_ours(self) -> bool:
        """Return whether our machinery failed: such a run is void, never a failure of the agent."""
        return self in (StopReason.MODEL_FAILED, StopReason.SANDBOX_FAILED)


class Outcome(StrEnum):
    """What came of a run."""

    SCORED = "scored"
    """There is a number."""
    FAILED = "failed"
    """The agent did not get to an end that could be scored."""
    VOID = "void"
    """Our machinery failed: it counts as no run at all."""


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        reason: Why.
        text: The last answer, or what went wrong.
    """

    reason: StopReason
    text: str = ""

    @property
    def outcome(self) -> Outcome:
        """Return what can be said before anything is scored."""
        if self.reason.is_ours:
            return Outcome.VOID
        return Outcome.SCORED if self.reason is StopReason.DONE else Outcome.FAILED


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may take.

    Attributes:
        turns: Replies of the model.
        window: Tokens of prompt and reply together, at most; the model's own window counts too.
        reply: Tokens of a reply.
        bad_turns: Replies in a row that lead to nothing.
        same_calls: Equal calls in a row with equal results.
        patience_s: Seconds without a token in which a model that cannot be reached is asked again.
    """

    turns: int = 500
    window: int = 512 * 1024
    reply: int = 32 * 1024
    bad_turns: int = 3
    same_calls: int = 6
    patience_s: float = 120.0

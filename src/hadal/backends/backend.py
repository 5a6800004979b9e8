"""The seam behind the server: something that continues token ids (decision 12 of the design).

`EngineBackend` runs our engine, `UpstreamBackend` asks another server, `ScriptedBackend` plays back what
it is given; the same routes are tested over each (tests/serve).
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hadal.errors import HadalError

__all__ = [
    "Backend",
    "CallGrammar",
    "Chunk",
    "Ended",
    "Generation",
    "LogprobChoice",
    "Prefill",
    "TokenLogprob",
]


@dataclass(frozen=True)
class CallGrammar:
    """What a completion has to follow.

    Attributes:
        structural_tag: As xgrammar takes it.
        after: Token id after which it begins to hold; None: from the start.
    """

    structural_tag: dict[str, Any]
    after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One completion to make.

    Attributes:
        prompt_ids: Token ids of the prompt.
        sampling: `hadal.engine.SamplingParams` fields that the request sets; JSON values only.
        grammar: What the completion must follow, if anything.
    """

    prompt_ids: Sequence[int]
    sampling: dict[str, Any]
    grammar: CallGrammar | None = None


@dataclass(frozen=True)
class LogprobChoice:
    """A token that could have stood at a place."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The token that stands at a place, and the best ones for it."""

    token_id: int
    logprob: float
    top: tuple[LogprobChoice, ...]


@dataclass(frozen=True)
class Prefill:
    """The prompt is being read."""

    done: int
    total: int


@dataclass(frozen=True)
class Chunk:
    """More of the completion: ids, or their bytes where only those are known."""

    token_ids: tuple[int, ...]
    data: bytes
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The completion is over.

    Attributes:
        reason: stop, length, or error.
        stop: Stop text or token that ended it.
        cached_tokens: Prompt tokens whose state was reused; None if the backend does not say.
        prefix: What else is known about the reuse, for the response's `hadal` field.
        prompt_logprobs: One per prompt token but the first, if asked for.
        routed_experts: Per token and layer, if asked for.
        weight_version: Of the model.
        error: With reason error.
    """

    reason: Literal["stop", "length", "error"]
    stop: str | int | None = None
    cached_tokens: int | None = None
    prefix: dict[str, Any] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    routed_experts: tuple[Any, ...] | None = None
    weight_version: str | None = None
    error: HadalError | None = None


Event = Prefill | Chunk | Ended


class Backend(Protocol):
    """Makes completions.

    Attributes:
        follows_grammars: Whether it can hold a completion to a grammar.
    """

    follows_grammars: bool

    @property
    def max_model_len(self) -> int:
        """Return the longest prompt and completion together; until `ready`, maybe a guess."""
        ...

    async def ready(self) -> None:
        """Make `max_model_len` known, where another server has to be asked; once it is, do nothing.

        `generate` calls it too. Callers do who reckon with the length before they generate.

        Raises:
            UpstreamError: That server cannot be reached, or refuses; `generate` would raise the same.
        """
        ...

    def generate(
        self, generation: Generation
    ) -> AbstractAsyncContextManager[AsyncGenerator[Event]]:
        """Start a completion; leaving the context frees all that it holds, finished or not.

        The iterator ends with exactly one `Ended`.

        Raises:
            InputError, ContextLengthError: The request does not fit.
            CapacityError: Too many are waiting.
        """
        ...

    def load(self) -> tuple[int, int]:
        """Return how many requests are running and waiting."""
        ...

    def healthy(self) -> bool:
        """Return whether requests can be served now."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...

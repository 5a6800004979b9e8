"""One request while the engine works on it."""

from dataclasses import dataclass, field

from torch import Tensor

from hadal.engine.completion import FinishReason, PrefixUse, TokenLogprobs
from hadal.engine.hybrid_cache import LiveSequence
from hadal.engine.sampler import History
from hadal.engine.sampling_params import Constraint, SamplingParams
from hadal.errors import HadalError

__all__ = ["Request"]


@dataclass(eq=False)
class Request:
    """What is asked, and how far it has come.

    Attributes:
        request_id: Unique among live requests.
        ids: Token ids of the prompt and of what has been generated.
        prompt_tokens: How many of them are the prompt.
        arrival: Number in order of arrival.
        end_tokens: Token ids that end it.
        max_tokens: Tokens to generate at most.
        sequence: Its state; None while it waits.
        drafts: Tokens proposed to come next.
        served: Tokens run for it so far, for fairness.
    """

    request_id: str
    ids: list[int]
    prompt_tokens: int
    params: SamplingParams
    arrival: int
    seed: int
    end_tokens: frozenset[int]
    max_tokens: int
    history: History
    sequence: LiveSequence | None = None
    constraint: Constraint | None = None
    draft_state: tuple[Tensor, Tensor] | None = None
    """Logits and streams of the MTP block after the newest token."""
    drafts: list[int] = field(default_factory=list[int])
    served: int = 0
    prefix: PrefixUse | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict[int, TokenLogprobs])
    routed_experts: dict[int, tuple[tuple[int, ...], ...]] = field(
        default_factory=dict[int, tuple[tuple[int, ...], ...]]
    )
    tail_bytes: bytes = b""
    num_preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: FinishReason | None = None
    stop: str | int | None = None
    error: HadalError | None = None

    @property
    def num_computed(self) -> int:
        """Return how many tokens its state holds."""
        return 0 if self.sequence is None else self.sequence.num_tokens

    @property
    def num_remaining(self) -> int:
        """Return how many known tokens are still to be run."""
        return len(self.ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Return how many tokens were generated."""
        return len(self.ids) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Return whether only its newest token is to be run."""
        return self.sequence is not None and self.num_remaining == 1

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Return the generated token ids."""
        return tuple(self.ids[self.prompt_tokens :])

"""From logits to a token. A pure function of logits, parameters, seed and position.

Noise comes from (seed, position) alone, so a token does not depend on what else is in the batch, on
preemption, or on whether it was drafted first: a drafted token is right exactly if this function
chooses it (Gumbel-max: the draft uses the same noise, which couples the two as well as any scheme
that does not see both distributions). Shape letters: V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.engine.completion import TokenLogprobs
from hadal.engine.sampling_params import SamplingParams

__all__ = ["History", "sample", "token_logprobs"]


@dataclass
class History:
    """Tokens so far, as far as penalties count them.

    Attributes:
        prompt: Token ids of the prompt.
        counts: Generated tokens and how often.
    """

    prompt: frozenset[int] = frozenset()
    counts: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        self.counts[token_id] = self.counts.get(token_id, 0) + 1


def sample(
    logits_V: Float[Tensor, " V"],
    params: SamplingParams,
    *,
    seed: int,
    position: int,
    history: History | None = None,
    forbidden: tuple[int, ...] = (),
) -> int:
    """Return the next token.

    Args:
        logits_V: Float32 logits of the model, masked already if there is a constraint.
        params: How to choose.
        seed: Of the generation.
        position: Of the token to choose, in its sequence.
        history: For penalties; not needed without.
        forbidden: Tokens that may not be chosen here.
    """
    logits_V = logits_V.float()
    if history is not None and params.has_penalties:
        logits_V = _penalized(logits_V, params, history)
    logits_V = _biased(logits_V, params.logit_bias)
    if forbidden:
        logits_V = logits_V.index_fill(0, _ids(forbidden, logits_V), float("-inf"))
    if params.greedy:
        return int(logits_V.argmax())
    kept_V = _truncated(logits_V / params.temperature, params)
    return int((kept_V + gumbel(seed, position, kept_V.shape[0]).to(kept_V.device)).argmax())


def gumbel(seed: int, position: int, count: int) -> Float[Tensor, " V"]:
    """Return the noise of one position: the same on every device."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return -torch.empty(count).exponential_(generator=generator).log()


def token_logprobs(logits_V: Float[Tensor, " V"], token_id: int, top: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the `top` best ones, before any sampling."""
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    own = logprobs_V[token_id]
    best = logprobs_V.topk(min(top, logprobs_V.shape[0])) if top else None
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(own),
        rank=int((logprobs_V > own).sum()) + 1,
        top=tuple(pairs),
    )


def _penalized(logits_V: Tensor, params: SamplingParams, history: History) -> Tensor:
    logits_V = logits_V.clone()
    if params.repetition_penalty != 1.0:
        seen = _ids(sorted(history.prompt | history.counts.keys()), logits_V)
        value = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(value > 0, value / penalty, value * penalty)
    if history.counts:
        generated = _ids(history.counts, logits_V)
        times = torch.tensor(list(history.counts.values()), device=logits_V.device)
        logits_V[generated] -= params.frequency_penalty * times + params.presence_penalty
    return logits_V


def _biased(logits_V: Tensor, bias: Mapping[int, float]) -> Tensor:
    if not bias:
        return logits_V
    values = torch.tensor(list(bias.values()), dtype=torch.float32, device=logits_V.device)
    return logits_V.index_add(0, _ids(bias, logits_V), values)


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)


def _truncated(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Return logits with -inf for what top-k, top-p or min-p leave out; never all of them."""
    top_k = params.top_k if 0 < params.top_k < logits_V.shape[0] else 0
    if top_k:
        threshold = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
    if params.min_p > 0:
        probabilities_V = logits_V.softmax(dim=-1)
        floor = params.min_p * probabilities_V.max()
        logits_V = logits_V.masked_fill(probabilities_V < floor, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits_V.softmax(dim=-1).double().sort(descending=True, stable=True)
        surplus = ordered.cumsum(0) - ordered >= params.top_p  # the mass before it is enough
        logits_V = logits_V.masked_fill(
            torch.zeros_like(surplus).scatter(0, order, surplus), float("-inf")
        )
    return logits_V

"""One step of the model for a plan: run, choose tokens, keep what is certain.

Drafted tokens are run with the newest one and judged by the same function that would have chosen
without them (`sampler.sample`); from the first wrong one on, the state is rewound. Blocks are sealed
and checkpoints kept only after that, so nothing shared ever contains a rejected token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.engine.completion import FinishReason, TokenLogprobs
from hadal.engine.hybrid_cache import Checkpoint, HybridCache
from hadal.engine.request import Request
from hadal.engine.sampler import sample, token_logprobs
from hadal.engine.scheduler import StepPlan, Work
from hadal.engine.team import SOLO, Team
from hadal.engine.threads import few_threads
from hadal.errors import EngineError
from hadal.model import SequenceCache, Slot, Trace, Transformer
from hadal.model.kernels.plans import forget_tables, unchanged

__all__ = ["Outcome", "Stepper", "TokenBytes"]

TokenBytes = Callable[[int], bytes]
"""The exact bytes of a token id, for stop texts."""


@dataclass
class Outcome:
    """What a step did for one piece of work.

    Attributes:
        work: The piece of work.
        start: Tokens of the state before.
        streams: [n, M, D] of the tokens that were run.
        token_ids: New tokens.
        logprobs: Theirs, if asked for.
        kept: Tokens of the work whose state was kept.
        slots: Windows and tails at the points where checkpoints are due.
    """

    work: Work
    start: int
    streams: Tensor
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    kept: int = 0
    slots: dict[int, tuple[Slot, ...]] = field(default_factory=dict[int, tuple[Slot, ...]])

    @property
    def request(self) -> Request:
        """Return whose work it is."""
        return self.work.request

    def chosen(self) -> tuple[list[int], str | None]:
        """Return what the other processes of a team must know: new tokens, and whether it ended."""
        finish = self.request.finish
        return self.token_ids, finish.value if finish is not None else None

    def take(self, token_ids: list[int], finish: str | None) -> None:
        """Do to the request what the first process of the team did."""
        self.token_ids = token_ids
        self.request.ids += token_ids
        self.request.finish = FinishReason(finish) if finish is not None else None


class Stepper:
    """Runs plans.

    Args:
        model: The network.
        cache: Its hybrid cache.
        num_drafts: Tokens to propose after each step.
        max_model_len: Where every sequence ends.
        token_bytes: For stop texts; None if there can be none.
        team: Processes that run the same plans; the first one chooses the tokens.
    """

    def __init__(
        self,
        model: Transformer,
        cache: HybridCache,
        *,
        num_drafts: int,
        max_model_len: int,
        token_bytes: TokenBytes | None,
        team: Team = SOLO,
    ) -> None:
        self._model = model
        self._cache = cache
        self._num_drafts = num_drafts
        self._max_model_len = max_model_len
        self._token_bytes = token_bytes
        self._team = team
        self._has_run = False

    def run(self, plan: StepPlan) -> list[Outcome]:
        """Run a plan's work. Requests are changed: tokens, state, and whether they are finished."""
        sizes = [
            (w.num_tokens + len(w.drafts), w.request.num_computed + w.num_tokens) for w in plan.work
        ]
        if not self._has_run:
            forget_tables(self._model)
            self._has_run = True
        with torch.inference_mode(), few_threads(self._model.config, sizes), unchanged():
            outcomes = self._forward(plan.work)
            self._choose(outcomes)
            for outcome in outcomes:
                self._settle(outcome)
            if self._num_drafts:
                self._feed_drafts(outcomes)
            for outcome in outcomes:
                self._keep(outcome)
            if self._num_drafts:
                self._propose([o.request for o in outcomes if _wants_draft(o.request)])
        return outcomes

    def _forward(self, works: list[Work]) -> list[Outcome]:
        ids: list[int] = []
        for work in works:
            start, sequence = work.request.num_computed, work.request.sequence
            assert sequence is not None
            ids += [*work.request.ids[start : start + work.num_tokens], *work.drafts]
            sequence.main.rewindable = self._looks_back(work, start)
        lengths = [w.num_tokens + len(w.drafts) for w in works]
        starts = [w.request.num_computed for w in works]
        caches = [w.request.sequence.main for w in works if w.request.sequence is not None]
        routed = any(w.request.params.return_routed_experts for w in works)
        trace = Trace() if routed else None
        ids_T = torch.tensor(ids, dtype=torch.int64, device=self._model.device)
        streams = self._model.streams(ids_T, lengths, caches, trace=trace)
        if trace is not None:
            self._record_routes(works, starts, lengths, trace)
        parts = streams.split(lengths)
        return [Outcome(w, s, p) for w, s, p in zip(works, starts, parts, strict=True)]

    def _looks_back(self, work: Work, start: int) -> bool:
        """Return whether a point within this call may be needed after it."""
        end = start + work.num_tokens + len(work.drafts)
        due = self._due(work.request, start, end)
        return bool(work.drafts) or any(point != end for point in due)

    def _due(self, request: Request, start: int, end: int) -> list[int]:
        assert request.sequence is not None
        return self._cache.due(request.sequence, start, end, request.prompt_tokens)

    def _record_routes(
        self, works: list[Work], starts: list[int], lengths: list[int], trace: Trace
    ) -> None:
        layers = [trace.routes[block.attn.name].tolist() for block in self._model.blocks]
        row = 0
        for work, start, length in zip(works, starts, lengths, strict=True):
            if work.request.params.return_routed_experts:
                for offset in range(length):  # rejected drafts are overwritten later
                    routes = tuple(tuple(layer[row + offset]) for layer in layers)
                    work.request.routed_experts[start + offset] = routes
            row += length

    def _choose(self, outcomes: list[Outcome]) -> None:
        """Compute the logits that are needed, in one product, and choose tokens."""
        wanted = [self._logit_rows(o) for o in outcomes]
        rows = [o.streams[low:] for o, low in zip(outcomes, wanted, strict=True)]
        counts = [r.shape[0] for r in rows]
        if not sum(counts):
            return
        logits = self._model.logits(torch.cat(rows)).split(counts)
        if self._team.leads:
            for outcome, low, logits_TV in zip(outcomes, wanted, logits, strict=True):
                if logits_TV.shape[0]:
                    self._choose_for(outcome, low, logits_TV)
        chosen = self._team.share([o.chosen() for o in outcomes])
        if not self._team.leads:
            for outcome, choice in zip(outcomes, chosen, strict=True):
                outcome.take(*choice)

    def _logit_rows(self, outcome: Outcome) -> int:
        """Return from which row of a piece of work on logits are needed."""
        work, request = outcome.work, outcome.request
        if request.params.prompt_logprobs is not None and outcome.start < request.prompt_tokens:
            return 0
        ends = outcome.start + work.num_tokens == len(request.ids)
        return work.num_tokens - 1 if ends else outcome.streams.shape[0]

    def _choose_for(self, outcome: Outcome, low: int, logits_TV: Tensor) -> None:
        request, work = outcome.request, outcome.work
        if not _is_finite(logits_TV):
            request.finish = FinishReason.ERROR
            request.error = EngineError(
                f"request {request.request_id}: the model's logits are not finite",
                hint="check the weights; a token chosen from them would be meaningless",
            )
            return
        if request.params.prompt_logprobs is not None:
            self._score_prompt(request, outcome.start + low, logits_TV)
        if outcome.start + work.num_tokens != len(request.ids):
            return
        first = work.num_tokens - 1 - low
        for idx in range(len(work.drafts) + 1):
            token = self._next(outcome, logits_TV[first + idx])
            if request.finish or idx == len(work.drafts) or token != work.drafts[idx]:
                break

    def _score_prompt(self, request: Request, position: int, logits_TV: Tensor) -> None:
        top = request.params.prompt_logprobs or 0
        for offset in range(logits_TV.shape[0]):
            nxt = position + offset + 1
            if nxt < request.prompt_tokens:
                scored = token_logprobs(logits_TV[offset], request.ids[nxt], top)
                request.prompt_logprobs[nxt] = scored

    def _next(self, outcome: Outcome, logits_V: Tensor) -> int:
        """Choose one token, append it, and see whether it is the last."""
        request, params = outcome.request, outcome.request.params
        if request.max_tokens == 0:
            request.finish = FinishReason.LENGTH
            return -1
        masked_V = request.constraint.mask(logits_V) if request.constraint else logits_V
        early = request.num_generated < params.min_tokens
        token = sample(
            masked_V,
            params,
            seed=request.seed,
            position=len(request.ids),
            history=request.history,
            forbidden=tuple(sorted(request.end_tokens)) if early else (),
        )
        if request.constraint:
            request.constraint.accept(token)
        if params.logprobs is not None:
            scored = token_logprobs(logits_V, token, params.logprobs)
            outcome.logprobs.append(scored)
            request.logprobs.append(scored)
        request.ids.append(token)
        request.history.add(token)
        outcome.token_ids.append(token)
        self._end(request, token, early=early)
        return token

    def _end(self, request: Request, token: int, *, early: bool) -> None:
        if not early and token in request.end_tokens:
            request.finish, request.stop = FinishReason.STOP, token
        elif not early and (text := self._stop_text(request, token)) is not None:
            request.finish, request.stop = FinishReason.STOP, text
        elif request.num_generated >= request.max_tokens or len(request.ids) >= self._max_model_len:
            request.finish = FinishReason.LENGTH

    def _stop_text(self, request: Request, token: int) -> str | None:
        if not request.params.stop or self._token_bytes is None:
            return None
        longest = max(len(text.encode()) for text in request.params.stop)
        new = self._token_bytes(token)
        seen = request.tail_bytes + new
        request.tail_bytes = seen[-(longest - 1) :] if longest > 1 else b""
        return next((text for text in request.params.stop if text.encode() in seen), None)

    def _settle(self, outcome: Outcome) -> None:
        """Rewind what was drafted wrongly; read off the slots where checkpoints are due."""
        request, sequence = outcome.request, outcome.request.sequence
        assert sequence is not None
        outcome.kept = outcome.work.num_tokens + max(len(outcome.token_ids) - 1, 0)
        request.drafted += len(outcome.work.drafts)
        request.accepted += outcome.kept - outcome.work.num_tokens
        request.served += outcome.streams.shape[0]
        request.drafts = []
        end = outcome.start + outcome.kept
        for point in self._due(request, outcome.start, end):
            outcome.slots[point] = sequence.main.slots(point)
        sequence.main.rewind(end)
        sequence.main.forget_call()
        outcome.streams = outcome.streams[: outcome.kept]
        self._cache.seal(sequence, request.ids)

    def _feed_drafts(self, outcomes: list[Outcome]) -> None:
        """Give the MTP block the tokens whose next one is now known; note its drafts."""
        for outcome in outcomes:
            sequence = outcome.request.sequence
            assert sequence is not None
            assert sequence.draft is not None
            before = [sequence.streams] if sequence.streams is not None else []
            outcome.streams = torch.cat((*before, outcome.streams))
            position = sequence.draft.num_tokens
            count = min(outcome.streams.shape[0], len(outcome.request.ids) - 1 - position)
            sequence.draft.rewindable = True
            sequence.streams = outcome.streams[count:].clone()
        fed = [(o, o.streams.shape[0] - _waiting(o)) for o in outcomes]
        fed = [(o, n) for o, n in fed if n > 0]
        if not fed:
            return
        ids: list[int] = []
        for outcome, count in fed:
            first = _draft_cache(outcome.request).num_tokens + 1
            ids += outcome.request.ids[first : first + count]
        logits, streams = self._model.draft(
            torch.cat([o.streams[:n] for o, n in fed]),
            torch.tensor(ids, dtype=torch.int64, device=self._model.device),
            [n for _, n in fed],
            [_draft_cache(o.request) for o, _ in fed],
        )
        ends = torch.tensor([n for _, n in fed]).cumsum(0) - 1
        for (outcome, _), end in zip(fed, ends.tolist(), strict=True):
            outcome.request.draft_state = (logits[end], streams[end : end + 1].clone())

    def _keep(self, outcome: Outcome) -> None:
        """Keep the checkpoints that are due, now that the MTP block has caught up."""
        request, sequence = outcome.request, outcome.request.sequence
        assert sequence is not None
        for point, main in outcome.slots.items():
            draft: tuple[Slot, ...] = ()
            streams = None
            if sequence.draft is not None:
                first = sequence.draft.call_start
                streams = outcome.streams[point - 1 - first : point - first].clone()
                draft = sequence.draft.slots(point - 1)
            checkpoint = Checkpoint(point, main, draft, streams)
            self._cache.keep(sequence, checkpoint, request.prompt_tokens)
        if sequence.draft is not None:
            sequence.draft.forget_call()

    def _propose(self, requests: list[Request]) -> None:
        """Let the MTP block say what comes next, from its own streams after the first token."""
        active = [r for r in requests if r.draft_state is not None]
        caches = [_draft_cache(r) for r in active]
        snapshots = [c.snapshot() for c in caches]
        for depth in range(self._num_drafts):
            drafted = [_drafted(r) for r in active] if self._team.leads else []
            for request, token in zip(active, self._team.share(drafted), strict=True):
                request.drafts.append(token)
            if depth + 1 == self._num_drafts or not active:
                break
            logits, streams = self._model.draft(
                torch.cat([r.draft_state[1] for r in active if r.draft_state is not None]),
                torch.tensor([r.drafts[-1] for r in active], device=self._model.device),
                [1] * len(active),
                caches,
            )
            for idx, request in enumerate(active):
                request.draft_state = (logits[idx], streams[idx : idx + 1])
        for request, cache, snapshot in zip(active, caches, snapshots, strict=True):
            cache.restore(snapshot)
            room = min(
                request.max_tokens - request.num_generated,
                self._max_model_len - len(request.ids),
            )
            del request.drafts[max(room - 1, 0) :]
            request.draft_state = None


def _waiting(outcome: Outcome) -> int:
    sequence = outcome.request.sequence
    assert sequence is not None
    assert sequence.streams is not None
    return sequence.streams.shape[0]


def _draft_cache(request: Request) -> SequenceCache:
    assert request.sequence is not None
    assert request.sequence.draft is not None
    return request.sequence.draft


def _drafted(request: Request) -> int:
    """Return the next draft: what the model would be asked for, asked of the MTP block."""
    assert request.draft_state is not None
    position = len(request.ids) + len(request.drafts)
    return sample(request.draft_state[0], request.params, seed=request.seed, position=position)


def _wants_draft(request: Request) -> bool:
    return request.finish is None and request.decoding


def _is_finite(logits_TV: Tensor) -> bool:
    """Return whether all are, by the least and the most of them; to ask each takes three to ten times as long."""
    if not logits_TV.numel():
        return True
    return bool(torch.isfinite(torch.stack((logits_TV.amin(), logits_TV.amax()))).all())

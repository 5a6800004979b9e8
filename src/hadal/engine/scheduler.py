"""Who runs how many tokens in the next step.

Depends on token counts only, never on the clock, so that a run can be repeated step by step.

Decoding requests come first, one token each (and its drafts). What is left of the token budget goes to
prefills in equal shares, so that a long prompt does not hold up short ones; a chunk that does not end
its prompt ends at a multiple of 128, where no compressor has a tail. A request is let in when blocks for
all of its known tokens can be had. When blocks run out, the request that came last gives its own back
and waits; it will go on from its last checkpoint.
"""

from bisect import insort
from dataclasses import dataclass, field

from hadal.engine.block_pool import BLOCK_TOKENS
from hadal.engine.engine_config import EngineConfig
from hadal.engine.hybrid_cache import HybridCache
from hadal.engine.request import Request

__all__ = ["Scheduler", "StepPlan", "Work"]


@dataclass(frozen=True)
class Work:
    """Tokens of one request to run in a step: known ones, then drafts."""

    request: Request
    num_tokens: int
    drafts: tuple[int, ...] = ()


@dataclass
class StepPlan:
    """A step: what runs, who was let in, who had to give way."""

    work: list[Work] = field(default_factory=list[Work])
    admitted: list[Request] = field(default_factory=list[Request])
    preempted: list[Request] = field(default_factory=list[Request])

    @property
    def num_tokens(self) -> int:
        """Return how many tokens run, drafts included."""
        return sum(w.num_tokens + len(w.drafts) for w in self.work)


class Scheduler:
    """Waiting and running requests."""

    def __init__(self, config: EngineConfig, cache: HybridCache) -> None:
        self._config = config
        self._cache = cache
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Let a request wait, in order of arrival."""
        insort(self.waiting, request, key=lambda r: r.arrival)

    def remove(self, request: Request) -> None:
        """Forget a request and free what it holds."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
            self._release(request)

    def plan(self) -> StepPlan:
        """Choose the work of the next step and take the blocks that it needs."""
        plan = StepPlan()
        budget = self._plan_decodes(plan, self._config.max_num_batched_tokens)
        self._admit(plan)
        self._plan_prefills(plan, budget)
        return plan

    def _plan_decodes(self, plan: StepPlan, budget: int) -> int:
        for request in [r for r in self.running if r.decoding]:
            if request not in self.running or budget == 0:
                continue  # gave way to one before it, or must wait for the next step
            drafts = tuple(request.drafts[: budget - 1])
            if self._make_room(request, 1 + len(drafts), plan):
                plan.work.append(Work(request, 1, drafts))
                budget -= 1 + len(drafts)
        return budget

    def _admit(self, plan: StepPlan) -> None:
        """Let waiting requests in while there are seats, and blocks for all of their tokens."""
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            request = self.waiting[0]
            promised = sum(
                self._cache.blocks_missing(r.sequence, len(r.ids) + 1)
                for r in self.running
                if r.sequence is not None
            )
            free = self._cache.pool.use().available - promised
            if self.running and self._cache.blocks_to_open(request.ids) > free:
                return
            self.waiting.pop(0)
            params = request.params
            whole = params.prompt_logprobs is not None or params.return_routed_experts
            reuse = not whole or request.num_generated > 0
            request.sequence, use = self._cache.open(request.ids, reuse=reuse)
            request.prefix = request.prefix or use
            insort(self.running, request, key=lambda r: r.arrival)
            plan.admitted.append(request)

    def _plan_prefills(self, plan: StepPlan, budget: int) -> None:
        """Share the budget; who was served least comes first, and what one leaves the next takes."""
        pending = [r for r in self.running if not r.decoding or r in plan.admitted]
        pending.sort(key=lambda r: (r.served, r.arrival))
        for idx, request in enumerate(pending):
            if budget == 0 or request not in self.running:
                continue
            share = max(budget // (len(pending) - idx), min(budget, BLOCK_TOKENS))
            num_tokens = _chunk(request, share)
            if self._make_room(request, num_tokens, plan):
                plan.work.append(Work(request, num_tokens))
                budget -= num_tokens

    def _make_room(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Take the blocks of a piece of work; False if the request itself had to give way."""
        assert request.sequence is not None
        end = request.num_computed + num_tokens
        while self._cache.blocks_missing(request.sequence, end) > self._cache.pool.use().available:
            planned = {id(w.request) for w in plan.work}
            victim = next((r for r in reversed(self.running) if id(r) not in planned), request)
            self._preempt(victim, plan)
            if victim is request:
                return False
        self._cache.reserve(request.sequence, end)
        return True

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        plan.preempted.append(request)
        self.add(request)

    def _release(self, request: Request) -> None:
        if request.sequence is not None:
            self._cache.close(request.sequence)
            request.sequence, request.drafts = None, []


def _chunk(request: Request, share: int) -> int:
    """Return how many tokens of a prefill to run: to its end, or to a multiple of 128."""
    if request.num_remaining <= share:
        return request.num_remaining
    start = request.num_computed
    aligned = (start + share) // BLOCK_TOKENS * BLOCK_TOKENS
    return aligned - start if aligned > start else share

"""The engine: requests of token ids in, updates out, one step at a time.

It knows no clock and no thread; `LLM` drives it to the end, a server from a thread of its own.
"""

from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any

from hadal.config import ModelConfig
from hadal.engine.block_pool import BLOCK_TOKENS
from hadal.engine.completion import Completion, FinishReason, PrefixUse, Update
from hadal.engine.engine_config import EngineConfig
from hadal.engine.fingerprint import fingerprint
from hadal.engine.hybrid_cache import HybridCache
from hadal.engine.memory import MemoryPlan, free_bytes, scratch_bytes, slot_bytes
from hadal.engine.paged_cache import BlockStorage
from hadal.engine.request import Request
from hadal.engine.sampler import History
from hadal.engine.sampling_params import SamplingParams
from hadal.engine.scheduler import Scheduler, StepPlan
from hadal.engine.step_log import StepLog
from hadal.engine.stepper import Outcome, Stepper, TokenBytes
from hadal.engine.storage_format import default_format, storage_format
from hadal.engine.team import SOLO, Team
from hadal.errors import CapacityError, ConfigError, ContextLengthError, EngineError, InputError
from hadal.model import Transformer

__all__ = ["Engine"]


class Engine:
    """A model that serves.

    Args:
        model: The network, in evaluation. From the first step on its modules and parameters have to stay those
            that they are: what is cached was computed with them.
        config: How to serve.
        token_bytes: Exact bytes of a token id, for stop texts.
        team: Processes that hold the other parts of the model, if it was divided.

    Attributes:
        memory: What it takes, by purpose.
        max_model_len: Longest prompt and completion together.
        num_steps: Steps run so far.

    Raises:
        ConfigError: Settings that do not fit together, the model, or the memory.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        *,
        token_bytes: TokenBytes | None = None,
        team: Team = SOLO,
    ) -> None:
        self.model = model.eval()
        self.config = config = config or EngineConfig()
        _check(config, model.config, team)
        name = config.cache_format
        if name == "auto":
            name = default_format(model.dtype, model.precision)
        stored = storage_format(name, model.config, model.dtype, model.precision)
        self.cache_format = name
        limit = config.max_model_len or model.config.max_position_embeddings
        block_bytes = BlockStorage(model, stored, 0).block_bytes
        num_blocks = team.least(_num_blocks(model, config, block_bytes))
        self.max_model_len = min(limit, num_blocks * BLOCK_TOKENS)
        if config.max_model_len is not None and self.max_model_len < config.max_model_len:
            raise ConfigError(
                f"max_model_len {config.max_model_len} does not fit: the cache holds "
                f"{num_blocks * BLOCK_TOKENS} tokens",
                hint="raise cache_bytes or lower max_model_len",
            )
        storage = BlockStorage(model, stored, num_blocks)
        self.fingerprint = fingerprint(model)
        root = blake2b(
            f"{self.fingerprint}|{config.weight_version}|{name}|{config.num_speculative_tokens > 0}".encode(),
            digest_size=16,
        ).digest()
        self.cache = HybridCache(model, config, storage, root, team)
        self.scheduler = Scheduler(config, self.cache)
        self.memory = MemoryPlan(
            weights=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
            blocks=num_blocks * storage.block_bytes,
            num_blocks=num_blocks,
            block_bytes=storage.block_bytes,
            slots=config.max_num_seqs * slot_bytes(model.config, stored, model.dtype),
            scratch=scratch_bytes(
                model.config,
                config.max_num_batched_tokens,
                self.max_model_len,
                model.embed.weight.detach(),
            ),
            checkpoints=config.checkpoint_bytes if config.prefix_caching else 0,
        )
        self._stepper = Stepper(
            model,
            self.cache,
            num_drafts=config.num_speculative_tokens,
            max_model_len=self.max_model_len,
            token_bytes=token_bytes,
            team=team,
        )
        self._team = team
        self._closed = self._parted = False
        self._news: list[dict[str, Any]] = []
        """What the rest of the team has not been told yet."""
        self._token_bytes = token_bytes
        header = {"model": self.fingerprint, "config": repr(config), "blocks": num_blocks}
        self._log = StepLog(config.step_log, header) if config.step_log is not None else None
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        """Return whether a request is waiting or running."""
        return bool(self._requests)

    def is_live(self, request_id: str) -> bool:
        """Return whether a request is waiting or running."""
        return request_id in self._requests

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Take a request; it runs with the next steps.

        Returns:
            Its id.

        Raises:
            InputError: Ids that are none of the model's, an empty prompt, an id in use, or stop texts
                without `token_bytes`.
            ContextLengthError: The prompt leaves no room for a token.
        """
        params = params or SamplingParams()
        request_id = request_id if request_id is not None else f"request-{self._arrivals}"
        self._check_request(prompt_ids, params, request_id)
        room = self.max_model_len - len(prompt_ids)
        eos = () if params.ignore_eos else (self.model.config.eos_token_id,)
        derived = blake2b(f"{self.config.seed}:{self._arrivals}".encode(), digest_size=7).digest()
        request = Request(
            request_id=request_id,
            ids=list(prompt_ids),
            prompt_tokens=len(prompt_ids),
            params=params,
            arrival=self._arrivals,
            seed=params.seed if params.seed is not None else int.from_bytes(derived, "little"),
            end_tokens=frozenset((*params.stop_token_ids, *eos)),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            history=History(frozenset(prompt_ids)),
            constraint=params.constraint() if params.constraint is not None else None,
        )
        self._arrivals += 1
        self._requests[request_id] = request
        if self._log is not None:
            self._log.add(request_id, list(prompt_ids), request.seed, params)
        self.scheduler.add(request)
        self._note("add", **_for_team(request))
        return request_id

    def cancel(self, request_id: str) -> Completion | None:
        """End a request now and free all that it holds; None if there is no such request."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        request.finish = FinishReason.CANCELLED
        if self._log is not None:
            self._log.write("cancel", id=request_id)
        self.scheduler.remove(request)
        self._note("cancel", request_id=request_id)
        return self._completion(request)

    def step(self) -> list[Update]:
        """Run the model once for as many requests as fit.

        Returns:
            An update for every request that something happened to.

        Raises:
            EngineError: A process of the team failed or is gone; this engine cannot go on.
        """
        if self._parted:
            raise EngineError(
                "the other processes of this engine are gone",
                hint="start it again; its cache on disk is kept",
            )
        if self._team.leads:
            self._tell()
        plan = self.scheduler.plan()
        if not plan.work:
            return self._stuck() if self._requests else []
        try:
            outcomes = self._stepper.run(plan)
        except BaseException as err:
            self._abandon(plan)
            self._part()  # the others wait for what will not come, and are not to be waited for
            if self._team is SOLO or isinstance(err, EngineError) or not isinstance(err, Exception):
                raise
            raise EngineError(f"a step failed, and the team with it: {err}") from err
        self.num_steps += 1
        if self._log is not None:
            self._record(plan, outcomes)
        return [self._update(outcome) for outcome in outcomes]

    def close(self) -> None:
        """Cancel all requests, dismiss the team, and let go of the folder on disk. Once is enough."""
        if self._closed:
            return
        self._closed = True
        for request_id in list(self._requests):
            self.cancel(request_id)
        if self._team.leads and not self._parted:
            with suppress(EngineError):  # it may be gone already
                self._team.share([{"kind": "end"}])
        self._part()
        self.cache.shut_down()
        if self._log is not None:
            self._log.close()

    def follow(self) -> None:
        """Do what the first process of the team does, until it closes its engine.

        Raises:
            EngineError: It is gone.
        """
        while True:
            for news in self._team.share(None):
                kind = news.pop("kind")
                if kind == "end":
                    return
                if kind == "cancel":
                    self.cancel(**news)
                else:
                    self.add(news["ids"], SamplingParams(**news["params"]), request_id=news["id"])
            self.step()

    def _tell(self) -> None:
        """Let the rest of the team know what came and went since the last step."""
        try:
            self._team.share(self._news)
        except EngineError:
            self._part()
            raise
        self._news = []

    def _part(self) -> None:
        if not self._parted:
            self._team.leave()
        self._parted = self._team is not SOLO

    def _note(self, kind: str, **news: Any) -> None:
        if self._team is not SOLO and self._team.leads:
            self._news.append({"kind": kind, **news})

    def _record(self, plan: StepPlan, outcomes: list[Outcome]) -> None:
        assert self._log is not None
        work = [
            {
                "id": o.request.request_id,
                "start": o.start,
                "run": o.work.num_tokens,
                "drafts": o.work.drafts,
                "tokens": o.token_ids,
                "blocks": o.request.sequence.blocks.ids if o.request.sequence is not None else [],
            }
            for o in outcomes
        ]
        preempted = [r.request_id for r in plan.preempted]
        self._log.write("step", step=self.num_steps, work=work, preempted=preempted)

    def _update(self, outcome: Outcome) -> Update:
        request = outcome.request
        completion = None
        progress = min(request.num_computed, request.prompt_tokens), request.prompt_tokens
        if request.finish is not None:
            del self._requests[request.request_id]
            self.scheduler.remove(request)
            completion = self._completion(request)
        return Update(
            request_id=request.request_id,
            token_ids=tuple(outcome.token_ids),
            logprobs=tuple(outcome.logprobs),
            prefill=progress,
            num_run=outcome.work.num_tokens + len(outcome.work.drafts),
            completion=completion,
        )

    def _abandon(self, plan: StepPlan) -> None:
        """Forget the requests of a step that failed: their state is not to be trusted."""
        for work in plan.work:
            self._requests.pop(work.request.request_id, None)
            self.scheduler.remove(work.request)

    def _stuck(self) -> list[Update]:
        """Fail the first waiting request: it was let in alone, and its blocks still do not suffice."""
        request = self.scheduler.waiting[0]
        request.finish = FinishReason.ERROR
        request.error = CapacityError(
            f"request {request.request_id}: its {len(request.ids)} tokens do not fit into "
            f"{self.cache.pool.use().total} blocks of {BLOCK_TOKENS}",
            hint="raise cache_bytes",
        )
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        return [Update(request_id=request.request_id, completion=self._completion(request))]

    def _completion(self, request: Request) -> Completion:
        assert request.finish is not None
        params, num_run = request.params, len(request.ids) - 1
        routes = [request.routed_experts.get(i, ()) for i in range(num_run)]
        scored = [request.prompt_logprobs[i] for i in sorted(request.prompt_logprobs)]
        return Completion(
            request_id=request.request_id,
            prompt_ids=tuple(request.ids[: request.prompt_tokens]),
            token_ids=request.output_ids,
            finish_reason=request.finish,
            stop=request.stop,
            logprobs=tuple(request.logprobs) if params.logprobs is not None else None,
            prompt_logprobs=tuple(scored) if params.prompt_logprobs is not None else None,
            routed_experts=tuple(routes) if params.return_routed_experts else None,
            prefix=request.prefix or PrefixUse(reason="it was never started"),
            seed=request.seed,
            weight_version=self.config.weight_version,
            num_preemptions=request.num_preemptions,
            drafted=request.drafted,
            accepted=request.accepted,
            error=request.error,
        )

    def _check_request(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str
    ) -> None:
        vocab = self.model.config.vocab_size
        wrong = next((t for t in prompt_ids if not _is_token(t, vocab)), None)
        if wrong is not None or not prompt_ids:
            got = "no token" if not prompt_ids else repr(wrong)
            raise InputError(f"prompt: expected token ids from 0 to {vocab - 1}, got {got}")
        wrong = next((t for t in (*params.stop_token_ids, *params.logit_bias) if t >= vocab), None)
        if wrong is not None:
            raise InputError(f"stop_token_ids, logit_bias: token {wrong} of {vocab} does not exist")
        if request_id in self._requests:
            raise InputError(f"request id {request_id!r} is in use")
        if params.stop and self._token_bytes is None:
            raise InputError(
                "stop texts need the bytes of tokens, and this engine was made without",
                hint="pass token_bytes to the engine, or use stop_token_ids",
            )
        if len(prompt_ids) >= self.max_model_len and params.max_tokens != 0:
            raise ContextLengthError(
                limit=self.max_model_len,
                actual=len(prompt_ids) + 1,
                hint="shorten the prompt, or raise max_model_len and cache_bytes",
            )


def _for_team(request: Request) -> dict[str, Any]:
    """Return what the other processes need of a request: not how its tokens are chosen."""
    params = {
        "max_tokens": request.params.max_tokens,
        "prompt_logprobs": request.params.prompt_logprobs,
        "return_routed_experts": request.params.return_routed_experts,
    }
    return {"id": request.request_id, "ids": request.ids, "params": params}


def _is_token(value: object, vocab: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab


def _check(config: EngineConfig, model: ModelConfig, team: Team) -> None:
    if config.tensor_parallel_size != team.shard.size:
        raise ConfigError(
            f"tensor_parallel_size {config.tensor_parallel_size}: this engine has one of "
            f"{team.shard.size} parts of its model",
            hint="give LLM the path of a checkpoint: it starts the other processes",
        )
    drafts = config.num_speculative_tokens
    if drafts and not model.num_nextn_predict_layers:
        raise ConfigError(
            f"num_speculative_tokens {drafts}: this model has no multi-token-prediction block",
            hint="set num_speculative_tokens to 0",
        )
    decodes = config.max_num_seqs * (1 + drafts)
    if decodes > config.max_num_batched_tokens:
        raise ConfigError(
            f"max_num_batched_tokens {config.max_num_batched_tokens} is less than the {decodes} that "
            f"{config.max_num_seqs} decoding requests take with {drafts} drafts each",
            hint="raise max_num_batched_tokens or lower max_num_seqs",
        )


def _num_blocks(model: Transformer, config: EngineConfig, block_bytes: int) -> int:
    longest = config.max_model_len or model.config.max_position_embeddings
    if (
        not block_bytes
    ):  # only sliding windows: blocks hold nothing, but sequences are counted in them
        return -(-longest // BLOCK_TOKENS) * config.max_num_seqs
    budget = config.cache_bytes
    if budget is None:
        budget = free_bytes(model.device) // 4
    enough = -(-longest // BLOCK_TOKENS) * config.max_num_seqs
    count = (
        min(budget // block_bytes, enough) if config.cache_bytes is None else budget // block_bytes
    )
    if count < 1:
        raise ConfigError(
            f"cache_bytes {budget} holds no block: one takes {block_bytes} bytes",
            hint=f"{BLOCK_TOKENS} tokens take one block",
        )
    return count

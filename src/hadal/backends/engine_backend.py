"""Our engine behind the server: one thread owns the model, queues lie between."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from hadal.backends.backend import (
    CallGrammar,
    Chunk,
    Ended,
    Event,
    Generation,
    LogprobChoice,
    Prefill,
    TokenLogprob,
)
from hadal.engine import (
    Completion,
    Constraint,
    Engine,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    Update,
)
from hadal.errors import CapacityError, EngineError, HadalError, InputError

__all__ = ["EngineBackend"]

Deliver = Callable[[Event], None]


class EngineBackend:
    """Runs an engine in a thread.

    Args:
        engine: From now on used by this thread alone.
        token_bytes: Exact bytes of token ids.
        max_waiting: Requests that may wait; more are refused.
        compile_grammar: Makes the constraint of a grammar; None: this backend follows none.
    """

    def __init__(
        self,
        engine: Engine,
        token_bytes: Callable[[tuple[int, ...]], bytes],
        *,
        max_waiting: int = 1000,
        compile_grammar: Callable[[CallGrammar], Callable[[], Constraint]] | None = None,
    ) -> None:
        self.engine = engine
        self.max_model_len = engine.max_model_len
        self._token_bytes = token_bytes
        self._max_waiting = max_waiting
        self.follows_grammars = compile_grammar is not None
        self._compile_grammar = compile_grammar
        self._condition = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[str, _Outlet] = {}
        self._stopping = False
        self._broken: BaseException | None = None
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="hadal-engine", daemon=True)
        self._thread.start()

    async def ready(self) -> None:
        """Do nothing: `max_model_len` is known."""

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncGenerator[AsyncGenerator[Event]]:
        """Start a completion; see `Backend.generate`."""
        if self.load()[1] >= self._max_waiting:
            raise CapacityError(
                f"{self._max_waiting} requests are waiting already", hint="try again later"
            )
        params = await asyncio.to_thread(self._params, generation)  # compiling takes a while
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        accepted: asyncio.Future[None] = loop.create_future()
        self._count += 1
        request_id = f"request-{self._count}"

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        def settle(error: HadalError | None) -> None:
            if accepted.done():
                return  # the client went away before its request was looked at
            if error is None:
                accepted.set_result(None)
            else:
                accepted.set_exception(error)

        def add() -> None:
            error: HadalError | None = None
            try:
                self.engine.add(generation.prompt_ids, params, request_id=request_id)
                self._streams[request_id] = _Outlet(deliver, params.stop)
            except HadalError as err:
                error = err
            loop.call_soon_threadsafe(settle, error)

        self._command(add)
        try:
            await accepted
            yield _drain(queue)
        finally:
            self._command(lambda: self._cancel(request_id))

    def load(self) -> tuple[int, int]:
        """Return how many requests are running and waiting."""
        scheduler = self.engine.scheduler
        return len(scheduler.running), len(scheduler.waiting) + len(self._commands)

    def healthy(self) -> bool:
        """Return whether the engine's thread runs."""
        return self._thread.is_alive() and self._broken is None and not self._stopping

    async def close(self) -> None:
        """Stop the thread and free everything."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)

    def _params(self, generation: Generation) -> SamplingParams:
        sampling = dict(generation.sampling)
        if generation.grammar is not None:
            if self._compile_grammar is None:
                raise InputError(
                    "this server cannot hold a completion to a grammar",
                    hint="install xgrammar: pip install 'hadal[serve]'",
                )
            sampling["constraint"] = self._compile_grammar(generation.grammar)
        return SamplingParams(**sampling)

    def _command(self, command: Callable[[], None]) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine has stopped: {self._broken}")
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _cancel(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self.engine.cancel(request_id)

    def _run(self) -> None:
        try:
            while self._next_commands():
                self._step()
        except BaseException as err:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            self._broken = err
            self._fail_all(err)
        finally:
            self.engine.close()

    def _next_commands(self) -> bool:
        """Run what was asked for; wait while there is nothing to do. False: stop."""
        with self._condition:
            while not (self._commands or self.engine.has_work or self._stopping):
                self._condition.wait()
            commands = [self._commands.popleft() for _ in range(len(self._commands))]
            stopping = self._stopping
        for command in commands:
            command()
        return not stopping

    def _step(self) -> None:
        try:
            updates = self.engine.step()
        except (RuntimeError, MemoryError) as err:  # the requests of that step are gone
            for request_id in [r for r in self._streams if not self.engine.is_live(r)]:
                self._end(request_id, _failure(err))
            return
        for update in updates:
            self._deliver(update)

    def _deliver(self, update: Update) -> None:
        outlet = self._streams.get(update.request_id)
        if outlet is None:
            return
        completion = update.completion
        if update.token_ids:
            data = outlet.passed(
                self._token_bytes(update.token_ids), completion.stop if completion else None
            )
            scored = tuple(map(_logprob, update.logprobs))
            outlet.deliver(Chunk(update.token_ids, data, scored))
        elif completion is None:
            outlet.deliver(Prefill(*update.prefill))
        if completion is not None:
            if outlet.held:
                outlet.deliver(Chunk((), outlet.held))
            self._end(update.request_id, _ended(completion))

    def _end(self, request_id: str, ended: Ended) -> None:
        self._streams.pop(request_id).deliver(ended)

    def _fail_all(self, err: BaseException) -> None:
        for request_id in list(self._streams):
            self._end(request_id, _failure(err))
        for command in list(self._commands):
            command()


@dataclass
class _Outlet:
    """Where a request's events go. Holds back what may become a stop text, and cuts it off."""

    deliver: Deliver
    stops: tuple[str, ...]
    held: bytes = b""

    def passed(self, data: bytes, stop: str | int | None) -> bytes:
        """Return the bytes that are certain to be said, given why the request ended, if it did."""
        data, self.held = self.held + data, b""
        if isinstance(stop, str):
            return data[: data.index(stop.encode())]
        texts = [text.encode() for text in self.stops]
        longest = max((len(text) for text in texts), default=1)
        for count in range(min(len(data), longest - 1), 0, -1):
            if any(text.startswith(data[-count:]) for text in texts):
                self.held = data[-count:]
                return data[:-count]
        return data


async def _drain(queue: "asyncio.Queue[Event]") -> AsyncGenerator[Event]:
    while True:
        event = await queue.get()
        yield event
        if isinstance(event, Ended):
            return


def _failure(err: BaseException) -> Ended:
    return Ended(
        reason="error", error=EngineError(f"the engine failed: {type(err).__name__}: {err}")
    )


def _ended(completion: Completion) -> Ended:
    reasons = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
    scored = completion.prompt_logprobs
    return Ended(
        reason=reasons.get(completion.finish_reason, "error"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        stop=completion.stop,
        cached_tokens=completion.prefix.hit,
        prefix=asdict(completion.prefix),
        prompt_logprobs=None if scored is None else tuple(map(_logprob, scored)),
        routed_experts=completion.routed_experts,
        weight_version=completion.weight_version,
        error=completion.error,
    )


def _logprob(scored: TokenLogprobs) -> TokenLogprob:
    top = tuple(LogprobChoice(token_id, value) for token_id, value in scored.top)
    return TokenLogprob(scored.token_id, scored.logprob, top)

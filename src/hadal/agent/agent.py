"""The loop: render, generate, parse, call tools, append; until there is a reason to stop."""

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hadal.agent.budget import described, prompt_parts, reply_parts
from hadal.agent.journal import Journal
from hadal.agent.patience import Patience
from hadal.agent.prompt import SYSTEM_PROMPT
from hadal.agent.stop import Ending, Limits, StopReason
from hadal.agent.trajectory import Trajectory, added, message_fields
from hadal.backends import Backend, CallGrammar, Chunk, Ended, Generation
from hadal.chat import AssistantMessage, Message, SystemMessage, Termination, UserMessage
from hadal.encoding import Encoding
from hadal.encoding.deltas import Section
from hadal.encoding.tokens import DSML, EOS, THINK_END
from hadal.errors import ConfigError, HadalError, SandboxError
from hadal.tools import Toolbox

__all__ = ["Agent", "AgentConfig"]

_EXCUSES = {
    StopReason.ENDLESS_REASONING: "Your reply was cut off while you were thinking. Think shortly, then act.",
    StopReason.CUT_OFF: "Your reply was cut off, and nothing of it was done. Say less, or in parts.",
    StopReason.MALFORMED: "Your reply could not be read, and nothing of it was done: {problem}. Write it again.",
    StopReason.EMPTY: "Your reply was empty. Call a tool, or answer.",
}
"""What the model is told when a reply of it leads to nothing."""
_LOST = "Beside those calls there was more in your reply, which could not be read, and nothing of it was done: {problem}."
"""What it is told when only a part of a reply could be read."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of a run.

    Attributes:
        system: What is said before the user speaks.
        mode: "thinking" or "chat".
        effort: How hard to think, by the generation's table.
        sampling: Fields of `SamplingParams`; with `logprobs` those of the chosen tokens are kept.
        limits: What it may take.
        hold_calls: Hold calls to their grammar, so that none can be malformed; needs a backend that can.
        keep_reasoning: Whether the reasoning of earlier user turns stays; only to show what it is good for.
    """

    system: str = SYSTEM_PROMPT
    mode: str = "thinking"
    effort: str | int | None = None
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    limits: Limits = field(default_factory=Limits)
    hold_calls: bool = False
    keep_reasoning: bool = True

    def check(self, encoding: Encoding) -> None:
        """See that a format has this mode and effort.

        Raises:
            ConfigError: It has not.
        """
        encoding.prompt(
            [SystemMessage(self.system), UserMessage("")], mode=self.mode, effort=self.effort
        )


class Agent:
    """One run.

    Args:
        backend: Makes the replies.
        encoding: The format, with the tokenizer.
        toolbox: What the model may call.
        journal: Of this run; where it has events, the run goes on from there.
        config: Settings.
        watch: Told every event as it is written.

    Raises:
        ConfigError: Calls are to be held to a grammar, and the backend cannot.
    """

    def __init__(
        self, backend: Backend, encoding: Encoding, toolbox: Toolbox, journal: Journal,
        config: AgentConfig | None = None, *, watch: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.config = config or AgentConfig()
        self.trajectory = Trajectory.of(journal.events)
        self._backend = backend
        self._encoding = encoding
        self._toolbox = toolbox
        self._journal = journal
        self._watch = watch
        self._system = SystemMessage(self.config.system, tools=toolbox.declarations)
        if self.config.hold_calls and not backend.follows_grammars:
            raise ConfigError(
                "this backend cannot hold calls to their grammar",
                hint="use a checkpoint with hadal[serve] installed, or do without hold_calls",
            )

    def note(self, kind: str, **fields: Any) -> None:
        """Write an event and take it in.

        Raises:
            StorageError: It cannot be written.
        """
        event = self._journal.append(kind, **fields)
        self.trajectory.apply(event)
        self._watch(event)

    async def run(self, messages: Sequence[str]) -> Ending:
        """Work until there is a reason to stop, and return it.

        Args:
            messages: What the user says, each after the answer to the last; those that the journal has
                are not said again.

        Raises:
            StorageError: The journal cannot be written.
            ConfigError: The run was begun with other tools, another mode, effort, sampling or system text, or the
                format has no such effort.
        """
        trajectory = self.trajectory
        self.config.check(self._encoding)
        settings: dict[str, Any] = {
            "system": self.config.system, "mode": self.config.mode, "effort": self.config.effort,
            "sampling": self.config.sampling, "tools": [dict(t.function) for t in self._toolbox.declarations],
        }  # fmt: skip
        self._check_settings(settings)
        if trajectory.ending is not None and trajectory.ending.reason.is_ours:
            self.note("again")  # what failed was ours: it may work now
        is_ready = False
        while trajectory.ending is None:
            try:
                if not is_ready:
                    await self._ready(settings)
                    is_ready = True
                await self._advance(messages)
            except SandboxError as error:
                self._end(StopReason.SANDBOX_FAILED, str(error))
            except HadalError as error:
                if error.code == "storage":
                    raise
                self._end(StopReason.MODEL_FAILED, str(error))
        return trajectory.ending

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """See that a run goes on as it was begun: its ids stand for what was said then."""
        begun = self.trajectory.start or {}
        other = [name for name, value in settings.items() if begun.get(name, value) != value]
        if other:
            raise ConfigError(
                f"the run {self._journal.path.stem} was begun with another {', another '.join(other)}",
                hint="go on with the same, or begin another run",
            )

    async def _advance(self, messages: Sequence[str]) -> None:
        """Do the next thing."""
        trajectory, limits = self.trajectory, self.config.limits
        if trajectory.open_calls:
            await self._call_tools()
        elif trajectory.bad is not None:
            self._excuse(trajectory.bad)
        elif trajectory.lost:
            self.note("user", text=_LOST.format(problem=trajectory.lost), by="harness")
        elif trajectory.history and trajectory.same_calls() >= limits.same_calls:
            self._end(StopReason.REPETITION, f"{trajectory.same_calls()} equal calls in a row")
        elif trajectory.reply is not None:
            await self._reply()  # the rest of one that was interrupted
        elif self._waits_for_user():
            if trajectory.users == len(messages):
                self._end(StopReason.DONE, trajectory.answer)
            else:
                self.note("user", text=messages[trajectory.users])
        elif trajectory.turns >= limits.turns:
            self._end(StopReason.MAX_TURNS, f"{trajectory.turns} turns")
        else:
            self._prompt()

    async def _ready(self, settings: dict[str, Any]) -> None:
        """Wait for the model, as only it knows how long a prompt may be; then begin, unless that was done."""
        patience = self._patience()
        while True:
            try:
                await self._backend.ready()
                break
            except HadalError as error:
                await patience.wait(error)
        if self.trajectory.start is None:
            self.note("start", version=1, window=self._window, **settings)

    def _patience(self) -> Patience:
        return Patience(
            self.config.limits.patience_s,
            lambda error, pause: self.note("retry", error=error, after_s=pause),
        )

    @property
    def _window(self) -> int:
        return min(self.config.limits.window, self._backend.max_model_len)

    def _waits_for_user(self) -> bool:
        messages = self.trajectory.messages
        return not messages or isinstance(messages[-1], AssistantMessage)

    def _end(self, reason: StopReason, text: str) -> None:
        self.note("end", reason=reason, text=text)

    # --- a turn of the model ---

    def _prompt(self) -> None:
        """Write down what the model is to see next, or end where that is too much."""
        trajectory = self.trajectory
        new, anew, parts = self._new_ids()
        total = len(new) + (0 if anew else len(trajectory.ids))
        window = self._window
        if total + 1 >= window:
            whole = added({} if anew else trajectory.parts, {"parts": parts})
            self._end(StopReason.CONTEXT_FULL, described(whole, window))
            return
        self.note("prompt", ids=new, anew=anew, parts=parts)

    def _new_ids(self) -> tuple[list[int], bool, dict[str, int]]:
        """Return the ids that come next, whether they replace all before, and how many are for what."""
        messages, settings = self._conversation(), self._settings()
        last = next(
            (
                i
                for i in range(len(messages), 0, -1)
                if isinstance(messages[i - 1], AssistantMessage)
            ),
            0,
        )
        if not last or not self.config.keep_reasoning:
            ids = self._encoding.encode(messages, **settings)
            told = self._encoding.encode(messages[:1], **settings, generation_prompt=False)
            return ids, True, prompt_parts(len(ids), messages[1:], len(told))
        context, new = messages[:last], messages[last:]
        ids = self._encoding.encode_continuation(self.trajectory.ids, context, new, **settings)
        return ids, False, prompt_parts(len(ids), new, None)

    def _conversation(self) -> list[Message]:
        messages = [self._system, *self.trajectory.messages]
        if self.config.keep_reasoning:
            return messages
        last = max(i for i, m in enumerate(messages) if isinstance(m, UserMessage))
        return [
            replace(m, reasoning_content="") if isinstance(m, AssistantMessage) and i < last else m
            for i, m in enumerate(messages)
        ]

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {"mode": config.mode, "effort": config.effort, "drop_thinking": False}

    async def _reply(self) -> None:
        """Generate a reply, or the rest of one, and write down what it comes to."""
        trajectory = self.trajectory
        assert trajectory.reply is not None
        start = self._encoding.prompt(self._conversation(), **self._settings()).start
        parser = self._encoding.stream(
            self.config.mode, start=start, tools=self._toolbox.declarations,
            new_id=_call_ids(trajectory.turns),
        )  # fmt: skip
        parser.feed_ids(trajectory.reply)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        began, ended = time.monotonic(), None
        async with aclosing(self._generated(trajectory, start)) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    said = text.decode(event.data)
                    scored = [scored.logprob for scored in event.logprobs]
                    kept = {"logprobs": scored} if scored else {}
                    self.note("tokens", ids=list(event.token_ids), text=said, **kept)
                    parser.feed(event.data)
                else:
                    ended = event
        reason = "stop" if ended is None else ended.reason
        message = parser.finish("length" if reason == "length" else "stop")
        self.note(
            "reply", message=message_fields(message), bad=_bad(message), termination=message.termination,
            problems=[str(p) for p in message.problems],
            problem=_problem(message), parts=self._parts(trajectory.reply, start), seconds=time.monotonic() - began,
            cached_tokens=ended.cached_tokens if ended else None,
        )  # fmt: skip

    def _parts(self, reply: list[int], start: Section) -> dict[str, int]:
        control_id = self._encoding.tokenizer.control_id
        return reply_parts(
            reply,
            reasons=start == "reasoning",
            think_end=control_id(THINK_END),
            dsml=control_id(DSML),
        )

    async def _generated(
        self, trajectory: Trajectory, start: Section
    ) -> AsyncGenerator[Chunk | Ended]:
        """Yield pieces of a reply; a backend that is gone for a while is asked for the rest."""
        limits = self.config.limits
        window = self._window
        patience = self._patience()
        while True:
            reply = trajectory.reply or []
            room = min(limits.reply - len(reply), window - len(trajectory.ids) - len(reply))
            if room <= 0:
                yield Ended(reason="length")
                return
            if reply and reply[-1] == self._encoding.tokenizer.control_id(EOS):
                return
            generation = Generation(
                prompt_ids=[*trajectory.ids, *reply],
                sampling={**self.config.sampling, "max_tokens": room},
                grammar=self._grammar(reply, start),
            )
            try:
                async with self._backend.generate(generation) as events, aclosing(events):
                    async for event in events:
                        if isinstance(event, Ended) and event.error is not None:
                            raise event.error
                        if isinstance(event, Chunk | Ended):
                            patience.renew()
                            yield event
                return
            except HadalError as error:
                await patience.wait(error)

    def _grammar(self, reply: list[int], start: Section) -> CallGrammar | None:
        """Return what a reply must follow; nothing once an interrupted one may be within a call."""
        if not self.config.hold_calls:
            return None
        thinks = start == "reasoning"
        close = self._encoding.tokenizer.control_id(THINK_END)
        if reply and (not thinks or close in reply):
            return None
        grammar = self._encoding.grammar(self._toolbox.declarations)
        return CallGrammar(grammar.structural_tag, close if thinks else None)

    def _excuse(self, bad: tuple[StopReason, str]) -> None:
        """Tell the model what was wrong with its reply, or end where it does not listen."""
        reason, problem = bad
        text = _EXCUSES[reason].format(problem=problem)
        if self.trajectory.bad_turns >= self.config.limits.bad_turns:
            self._end(reason, problem or text)
        else:
            self.note("user", text=text, by="harness")

    # --- tools ---

    async def _call_tools(self) -> None:
        """Make all calls that have no result, side by side."""
        made = [self._call(call_id) for call_id in self.trajectory.open_calls]
        for found in await asyncio.gather(*made, return_exceptions=True):
            if found is not None:
                raise found

    async def _call(self, call_id: str) -> None:
        call = self.trajectory.open_calls[call_id]
        began = time.monotonic()
        self.note("call", call=call_id, name=call.name)
        output = await self._toolbox.call(
            call, f"{self._journal.path.stem}/{call_id}",
            said=lambda text: self.note("output", call=call_id, text=text),
        )  # fmt: skip
        self.note(
            "result", call=call_id, text=output.text, failed=output.failed, exit_code=output.exit_code,
            step=output.step, full_text=output.full_text, seconds=time.monotonic() - began,
            files=[asdict(file) for file in output.files],
        )  # fmt: skip


def _call_ids(turn: int) -> Callable[[], str]:
    """Return a maker of ids that are the same when a reply is parsed again."""
    numbers = iter(range(1 << 30))
    return lambda: f"call_{turn + 1}_{next(numbers)}"


def _problem(message: AssistantMessage) -> str:
    """Return what of a reply could not be read, and why."""
    return "; ".join(p.reason for p in message.problems if p.fatal)[:500]


def _bad(message: AssistantMessage) -> StopReason | None:
    """Return why a reply leads to nothing; None where it has calls or answers."""
    if message.tool_calls:
        return None
    match message.termination:
        case Termination.LENGTH_IN_REASONING:
            return StopReason.ENDLESS_REASONING
        case Termination.LENGTH_IN_CONTENT | Termination.LENGTH_IN_CALL:
            return StopReason.CUT_OFF
        case Termination.MALFORMED:
            return StopReason.MALFORMED
        case _:
            text = message.content if isinstance(message.content, str) else "x"
            return None if text.strip() else StopReason.EMPTY

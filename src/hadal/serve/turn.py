"""One turn of a conversation, whichever API it came through: prompt in, deltas and a message out.

The APIs differ only in how they read a request and write what happens here.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from hadal.backends.backend import (
    Backend,
    CallGrammar,
    Chunk,
    Ended,
    Generation,
    Prefill,
    TokenLogprob,
)
from hadal.chat import AssistantMessage, Conversation, NamedToolChoice
from hadal.chat.memory import ReasoningMemory
from hadal.encoding import Encoding, Prompt
from hadal.encoding.deltas import Delta
from hadal.encoding.tokens import THINK_END
from hadal.errors import ConfigError, ContextLengthError, InvalidConversationError

__all__ = ["THINK_MAX_WINDOW", "Finished", "Front", "Said", "Turn", "Usage"]

THINK_MAX_WINDOW: Final = 384 * 1024
"""Tokens of context that the model's maximum effort is meant for (its model card)."""

_EFFORTS: Final = {
    "minimal": "high",
    "low": "high",
    "medium": "high",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}
"""For generations with fewer efforts than the APIs have words."""


@dataclass(frozen=True)
class Turn:
    """A request, ready to run.

    Attributes:
        conversation: As it came, lost reasoning put back.
        prompt: Rendered.
        prompt_ids: Its token ids.
        mode: thinking or chat.
        restored: Places of messages whose reasoning was put back.
        missing: Places of turns with calls whose reasoning is lost for good.
    """

    conversation: Conversation
    prompt: Prompt
    prompt_ids: list[int]
    mode: str
    restored: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True)
class Said:
    """More of the completion.

    Attributes:
        deltas: What has become certain of it.
        token_ids: Its tokens, which may say nothing yet.
        logprobs: Theirs, if asked for.
    """

    deltas: list[Delta]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of a turn."""

    prompt: int
    completion: int
    reasoning: int
    cached: int | None


@dataclass(frozen=True)
class Finished:
    """The turn is over.

    Attributes:
        message: What the model said.
        finish_reason: stop, length or tool_calls.
        stop: Stop text that ended it.
        usage: Tokens.
        ended: What the backend said.
        notes: For the response's `hadal` field.
        token_ids: Of the whole completion.
        logprobs: Theirs, if asked for.
    """

    message: AssistantMessage
    finish_reason: str
    stop: str | None
    usage: Usage
    ended: Ended
    notes: dict[str, Any]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass
class Front:
    """Encoding, backend and memory of a server.

    Attributes:
        model: Name that the server goes by.
        default_mode: For requests that do not say.
        constrain_calls: Hold calls to their grammar where a tool asks for `strict`, or always.
        allow_small_window: Accept maximum effort with less than `THINK_MAX_WINDOW`.
    """

    model: str
    encoding: Encoding
    backend: Backend
    memory: ReasoningMemory | None = field(default_factory=ReasoningMemory)
    default_mode: str = "thinking"
    constrain_calls: bool = False
    allow_small_window: bool = False

    def open(
        self,
        conversation: Conversation,
        *,
        scope: str = "",
        response_ids: dict[int, str] | None = None,
    ) -> Turn:
        """Put back what the client lost and make the prompt.

        Raises:
            InvalidConversationError, ConfigError: The conversation cannot be rendered.
            ContextLengthError: It is too long, or the window too small for maximum effort.
        """
        messages, restored = conversation.messages, ()
        if not messages:
            raise InvalidConversationError("there is no message", where="messages")
        if self.memory is not None:
            found = self.memory.restore(messages, response_ids=response_ids, scope=scope)
            messages, restored = found.messages, found.turns
        mode = conversation.mode or self.default_mode
        effort = self._effort(conversation.effort, mode)
        by_grammar = self.backend.follows_grammars and _forced(conversation)
        prompt = self.encoding.prompt(
            messages,
            mode=mode,
            effort=effort,
            tools=conversation.tools,
            tool_choice="auto" if by_grammar else conversation.tool_choice,
            response_format=conversation.response_format,
        )
        ids = self.encoding.tokenizer.encode_items(prompt.items)
        if len(ids) >= self.backend.max_model_len:
            raise ContextLengthError(
                limit=self.backend.max_model_len,
                actual=len(ids) + 1,
                hint="shorten the conversation, or serve with a longer max_model_len",
            )
        missing = tuple(
            place
            for place, message in enumerate(messages)
            if mode == "thinking"
            and isinstance(message, AssistantMessage)
            and message.tool_calls
            and not (message.reasoning_content or "").strip()
        )
        return Turn(conversation, prompt, ids, mode, restored, missing)

    def _effort(self, asked: str | None, mode: str) -> str | int | None:
        """Return the generation's word for an effort; unknown ones are an error."""
        if asked is None or mode != "thinking":
            return None
        generation = self.encoding.generation
        effort: str | int | None = int(asked) if asked.isdigit() else asked
        if effort not in generation.efforts and not isinstance(effort, int):
            effort = _EFFORTS.get(asked, asked)
            if effort not in generation.efforts and effort == "high":
                effort = None
        try:
            generation.effort_text(effort)
        except ConfigError as err:
            raise InvalidConversationError(err.message, where="reasoning_effort") from None
        small = self.backend.max_model_len < THINK_MAX_WINDOW
        if effort == "max" and small and not self.allow_small_window:
            raise ContextLengthError(
                limit=self.backend.max_model_len,
                actual=THINK_MAX_WINDOW,
                hint="maximum effort is meant for a window of 384K tokens: ask for a lower effort, "
                "serve a longer max_model_len, or start the server with --allow-small-window",
            )
        return effort

    async def run(
        self, turn: Turn, sampling: dict[str, Any], *, response_id: str, scope: str = ""
    ) -> AsyncGenerator[Prefill | Said | Finished]:
        """Run a turn: progress, pieces, and at last the whole. Closing it early frees everything.

        Raises:
            HadalError: As `Backend.generate`, or what the backend reported.
        """
        tools = () if turn.conversation.tool_choice == "none" else turn.conversation.tools
        parser = self.encoding.stream(turn.mode, start=turn.prompt.start, tools=tools)
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        generation = Generation(
            prompt_ids=turn.prompt_ids, sampling=sampling, grammar=self._grammar(turn)
        )
        async with self.backend.generate(generation) as events, aclosing(events) as events:
            async for event in events:
                if isinstance(event, Prefill):
                    yield event
                elif isinstance(event, Chunk):
                    ids += event.token_ids
                    logprobs += event.logprobs
                    yield Said(parser.feed(event.data), event.token_ids, event.logprobs)
                else:
                    if event.error is not None:
                        raise event.error
                    text_stop = event.stop if isinstance(event.stop, str) else None
                    message = parser.finish("length" if event.reason == "length" else "stop")
                    if parser.last_deltas:
                        yield Said(parser.last_deltas, (), ())
                    if self.memory is not None:
                        self.memory.remember(message, response_id=response_id, scope=scope)
                    assert message.termination is not None
                    reason = message.termination.finish_reason
                    yield Finished(
                        message,
                        "stop" if reason == "malformed" else reason,
                        text_stop,
                        self._usage(turn, message, ids, event),
                        event,
                        _notes(turn, message, event),
                        tuple(ids),
                        tuple(logprobs),
                    )

    def _grammar(self, turn: Turn) -> CallGrammar | None:
        """Return the grammar that the completion must follow, if it must follow one."""
        conversation = turn.conversation
        strict = any(tool.function.get("strict") for tool in conversation.tools)
        wanted = self.constrain_calls or strict or _forced(conversation)
        if not (wanted and conversation.tools and self.backend.follows_grammars):
            return None
        choice = conversation.tool_choice
        if choice == "none":
            return None
        options = conversation.options
        parallel = options.get("parallel_tool_calls") is not False
        parallel = parallel and not options.get("disable_parallel_tool_use")
        grammar = self.encoding.grammar(conversation.tools, tool_choice=choice, parallel=parallel)
        thinks = turn.prompt.start == "reasoning"
        after = self.encoding.tokenizer.control_id(THINK_END) if thinks else None
        return CallGrammar(grammar.structural_tag, after)

    def _usage(self, turn: Turn, message: AssistantMessage, ids: list[int], ended: Ended) -> Usage:
        reasoning = 0
        if turn.prompt.start == "reasoning":
            close = self.encoding.tokenizer.control_id(THINK_END)
            reasoning = ids.index(close) if close in ids else len(ids)
            if not message.reasoning_content:
                reasoning = 0
        return Usage(len(turn.prompt_ids), len(ids), reasoning, ended.cached_tokens)


def _forced(conversation: Conversation) -> bool:
    """Return whether the completion has to call a tool."""
    choice = conversation.tool_choice
    return choice == "required" or isinstance(choice, NamedToolChoice)


def _notes(turn: Turn, message: AssistantMessage, ended: Ended) -> dict[str, Any]:
    """Return what a client may want to know that its API has no field for."""
    notes: dict[str, Any] = {"termination": message.termination}
    if turn.restored:
        notes["reasoning_restored"] = list(turn.restored)
    if turn.missing:
        notes["reasoning_missing"] = list(turn.missing)
    if message.problems:
        notes["problems"] = [
            {"kind": p.kind, "offset": p.offset, "reason": p.reason, "text": p.text, "name": p.name}
            for p in message.problems
        ]
    if ended.prefix is not None:
        notes["prefix"] = ended.prefix
    if ended.weight_version is not None:
        notes["weight_version"] = ended.weight_version
    return notes

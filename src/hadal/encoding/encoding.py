"""`Encoding`: the front door. Messages to text and ids, and a completion back to a message."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from hadal.chat.controls import check_tool_choice
from hadal.chat.messages import (
    AssistantMessage,
    Message,
    NamedToolChoice,
    Tool,
    ToolChoice,
)
from hadal.chat.openai_chat import read_messages
from hadal.chat.wire import read_tool
from hadal.encoding.deltas import Section
from hadal.encoding.generations import Effort, detect_generation, generation_named
from hadal.encoding.grammar import Grammar, write_grammar
from hadal.encoding.parser import FinishReason, Parser
from hadal.encoding.passes import Dict
from hadal.encoding.reference import parse_reference
from hadal.encoding.renderer import Renderer, RenderSettings
from hadal.encoding.repair import arrange, calls_tools, place_declarations, to_reference
from hadal.encoding.tokenizer import Tokenizer
from hadal.encoding.tokens import EOS
from hadal.errors import ConfigError, EncodingError, InvalidConversationError

__all__ = ["Encoding", "Messages", "Prompt"]

Messages = Sequence[Message | Mapping[str, Any]]
"""`hadal.chat` messages, or OpenAI-shaped dicts, or both."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        items: `Control` tokens and texts; joined, they are the text.
        start: The section in which the model's completion begins.
    """

    items: tuple[str, ...]
    start: Section

    @cached_property
    def text(self) -> str:
        """The prompt as one string."""
        return "".join(self.items)


class Encoding:
    """The message format of one generation of DeepSeek-V4.

    Attributes:
        strict: Byte-exact with the published reference, raising where it raises. Otherwise the
            defects listed in docs/formats/encoding.md are fixed.
    """

    def __init__(
        self, generation: str, *, tokenizer: Tokenizer | None = None, strict: bool = False
    ) -> None:
        self.generation = generation_named(generation)
        self.strict = strict
        self._tokenizer = tokenizer
        self._renderer = Renderer(self.generation)

    @classmethod
    def load(
        cls,
        generation: str | None = None,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        strict: bool = False,
    ) -> Self:
        """Make an encoding.

        Args:
            generation: "v4", "v4-0731" or "v4.1"; None to read it from the checkpoint that
                `tokenizer` names.
            tokenizer: A checkpoint's folder, its `tokenizer.json`, or one already loaded; needed
                for ids only.
            strict: See the class.

        Raises:
            ConfigError: Unknown generation.
            CheckpointError: The tokenizer or the generation cannot be read.
        """
        if generation is None:
            if not isinstance(tokenizer, str | Path):
                raise ConfigError(
                    "the generation of the format is not given",
                    hint="Encoding.load('v4'), or tokenizer=<checkpoint folder> to read it there",
                )
            generation = detect_generation(tokenizer)
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer(tokenizer)
        return cls(generation, tokenizer=tokenizer, strict=strict)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ConfigError: None was given to `load`.
        """
        if self._tokenizer is None:
            raise ConfigError(
                "token ids need a tokenizer, and none was loaded",
                hint="Encoding.load('v4', tokenizer=<checkpoint folder or tokenizer.json>)",
            )
        return self._tokenizer

    def prompt(
        self,
        messages: Messages,
        *,
        mode: str = "thinking",
        effort: Effort = None,
        drop_thinking: bool = True,
        context: Messages | None = None,
        bos: bool = True,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        response_format: Mapping[str, Any] | None = None,
        generation_prompt: bool | None = None,
    ) -> Prompt:
        """Render messages.

        Args:
            messages: The conversation, or its new part if `context` is given.
            mode: "thinking" or "chat".
            effort: How hard to think, by the generation's table; None for its default.
            drop_thinking: Drop the reasoning of earlier turns, unless tools are in play.
            context: Messages rendered before; they are looked at, not rendered.
            bos: Begin with the beginning-of-sentence token (never after a context).
            tools: Declared for the whole conversation, instead of on its system message.
            tool_choice: "none" renders no tools; "required" or a name opens the block of calls,
                in chat mode only (which tool it is, `grammar` enforces).
            response_format: For the whole conversation.
            generation_prompt: Open the next assistant turn: None after user turns (as the
                reference does), True always, False never.

        Raises:
            ConfigError: Unknown mode, effort or combination.
            InvalidConversationError: A message that cannot be read or rendered.
        """
        settings = RenderSettings(mode, effort, drop_thinking, bos, generation_prompt, self.strict)
        _check_choice(tool_choice)
        declared = () if tool_choice == "none" else _read_tools(tools)
        if self.strict:
            if declared or response_format is not None:
                raise ConfigError(
                    "the reference takes tools and response_format on messages only",
                    hint="put them on the system message, or use strict=False",
                )
            old, new = [
                [
                    dict(m) if isinstance(m, Mapping) else to_reference(m, self.generation)
                    for m in part
                ]
                for part in (context or (), messages)
            ]
        else:
            read = [*read_messages(context or (), images=True)]
            first_new = len(read)
            read += read_messages(messages, images=True)
            if tool_choice == "none":
                read = [_without_tools(m) for m in read]
            if calls_tools(read):
                settings = replace(settings, drop_thinking=False)
            old, new = self._repair(read, first_new, declared, response_format)
        items = self._render(new, settings, old)
        start = self._start(new, settings)
        if tool_choice not in ("auto", "none"):
            self._force_call(items, mode=mode, start=start)
            start = "calls"
        return Prompt(tuple(items), start)

    def render(self, messages: Messages, **settings: Any) -> str:
        """The text of the prompt; arguments and errors as for `prompt`."""
        return self.prompt(messages, **settings).text

    def encode(self, messages: Messages, **settings: Any) -> list[int]:
        """The ids of the prompt; no text in a message can become a control token.

        Arguments and errors as for `prompt`; also EncodingError if the tokenizer lacks a token.
        """
        return self.tokenizer.encode_items(self.prompt(messages, **settings).items)

    def encode_continuation(
        self, ids: Sequence[int], context: Messages, messages: Messages, **settings: Any
    ) -> list[int]:
        """Encode only what is new after a turn of the model, so that its cached prefix stays.

        The ids that the model wrote are never made again from their text: other ids may spell the
        same text. `ids + result` is what to feed it next.

        Args:
            ids: Everything so far: the last prompt and the model's completion, with or without
                the end-of-sentence token.
            context: The messages that `ids` stand for, the model's last message included.
            messages: What came since.
            settings: As for `prompt`; `context` and `bos` excepted.

        Returns:
            The new ids only.

        Raises:
            EncodingError: The new messages change how the old ones are rendered (without tools, a
                new user turn drops earlier reasoning), or the context does not end with the
                assistant.
        """
        whole = self.prompt([*context, *messages], **settings).text
        closed: dict[str, Any] = {**settings, "generation_prompt": False}
        before = self.prompt(context, **closed).text
        last = context[-1] if context else None
        role = last.get("role") if isinstance(last, Mapping) else getattr(last, "role", None)
        if role != "assistant":
            raise EncodingError(
                f"a continuation follows a turn of the assistant, got {role!r} as the last role"
            )
        if not whole.startswith(before):
            same = next(
                (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
                min(len(before), len(whole)),
            )
            raise EncodingError(
                f"the new messages change the prompt from character {same} on, so that the ids "
                "before cannot be kept",
                hint="declare tools or pass drop_thinking=False to keep reasoning, or encode anew",
            )
        prompt = self.prompt(messages, context=context, **settings)
        eos = self.tokenizer.control_id(EOS)
        closing = [] if ids and ids[-1] == eos else [eos]
        return closing + self.tokenizer.encode_items(prompt.items)

    def stream(
        self,
        mode: str = "thinking",
        *,
        start: Section | None = None,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
        budgets: Mapping[Section, int] | None = None,
    ) -> Parser:
        """A parser for one completion that arrives in pieces.

        Args:
            mode: "thinking" or "chat".
            start: Section in which the prompt left off, as `Prompt.start` says; None for the
                beginning of a turn in this mode.
            tools: Declared tools; an empty sequence: calls are not enabled; None: not known.
            new_id: Makes the ids of calls; by default they are random.
            budgets: Characters after which a section is reported by an `Overrun` delta.

        Raises:
            ConfigError: Unknown mode or section.
        """
        if mode not in ("thinking", "chat"):
            raise ConfigError(f"unknown mode: expected 'thinking' or 'chat', got {mode!r}")
        begin = start or ("reasoning" if mode == "thinking" else "content")
        if begin not in ("reasoning", "content", "calls"):
            raise ConfigError(
                f"unknown section: expected reasoning, content or calls, got {begin!r}"
            )
        tags = self.generation.tags
        check = partial(parse_reference, thinking=begin == "reasoning", tags=tags)
        return Parser(
            tags,
            start=begin,
            tools=None if tools is None else _read_tools(tools),
            new_id=new_id or _random_id,
            budgets=budgets,
            decode_ids=self._tokenizer.decode_bytes if self._tokenizer else None,
            check=check if self.strict else None,
        )

    def parse(
        self,
        completion: str | bytes | Sequence[int],
        mode: str = "thinking",
        *,
        finish_reason: FinishReason | None = None,
        **settings: Any,
    ) -> AssistantMessage:
        """Parse a whole completion: the same as feeding it to `stream` in one piece, or in any.

        Args:
            completion: Text, UTF-8 or token ids.
            mode: "thinking" or "chat".
            finish_reason: Why the engine stopped; None: only an end-of-sentence token in the text
                shows that it is whole.
            settings: As for `stream`.

        Raises:
            ConfigError: Unknown mode, section or reason.
            MalformedCompletionError: Strict face only: where the reference raises.
        """
        parser = self.stream(mode, **settings)
        if isinstance(completion, str | bytes):
            parser.feed(completion)
        else:
            parser.feed_ids(completion)
        return parser.finish(finish_reason)

    def grammar(
        self,
        tools: Sequence[Tool | Mapping[str, Any]],
        *,
        tool_choice: ToolChoice = "auto",
        parallel: bool = True,
    ) -> Grammar:
        """The grammar of calls of these tools, for an engine that can be held to one.

        Args:
            tools: Declared tools.
            tool_choice: "required": the structural tag demands a call; a name: of that tool.
            parallel: Allow several calls.

        Raises:
            ConfigError: An unknown choice, or "none": then there is no call to hold to anything.
            InvalidConversationError: No tools, two of one name, a name that has no safe markup, or a
                choice of a tool that is not declared.
        """
        _check_choice(tool_choice)
        if tool_choice == "none":
            raise ConfigError("tool_choice 'none' has no grammar", hint="do without one")
        read = _read_tools(tools)
        check_tool_choice(tool_choice, read, "tool_choice")
        if isinstance(tool_choice, NamedToolChoice):
            read = tuple(tool for tool in read if tool.name == tool_choice.name)
        required = tool_choice != "auto"
        return write_grammar(read, self.generation.tags, required=required, parallel=parallel)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens spelled out."""
        return self.tokenizer.decode(ids)

    def _repair(
        self,
        messages: list[Message],
        first_new: int,
        tools: Sequence[Tool],
        response_format: Mapping[str, Any] | None,
    ) -> tuple[list[Dict], list[Dict]]:
        """Both parts of a conversation in good shape; declarations belong to its beginning."""
        old = arrange(messages[:first_new], self.generation)
        new = messages[first_new:]
        if old:
            old = place_declarations(old, tools, response_format)
            new = arrange([*old[:1], *new], self.generation)[1:]
        else:
            new = place_declarations(arrange(new, self.generation), tools, response_format)
        return (
            [to_reference(m, self.generation) for m in old],
            [to_reference(m, self.generation) for m in new],
        )

    def _render(self, new: list[Dict], settings: RenderSettings, old: list[Dict]) -> list[str]:
        try:
            return self._renderer.render(new, settings, context=old)
        except (AttributeError, KeyError, TypeError) as err:
            if not self.strict:
                raise
            # The reference fails the same way on values of a wrong type.
            raise InvalidConversationError(
                f"a message has a value of the wrong type: {err}",
                hint="the default face (strict=False) says where",
            ) from err

    def _start(self, new: list[Dict], settings: RenderSettings) -> Section:
        """Where the completion begins: one place decides it for rendering and for parsing."""
        if settings.mode != "thinking":
            return "content"
        last = new[-1] if new else {}
        if last.get("task") not in (None, "action"):
            return "content"
        if last.get("role") == "assistant" and last.get("wo_eos"):
            continues = last.get("prefix") and last.get("reasoning_content")
            return "reasoning" if continues and not last.get("content") else "content"
        return "reasoning"

    def _force_call(self, items: list[str], *, mode: str, start: Section) -> None:
        if mode == "thinking" or start != "content":
            raise ConfigError(
                "a forced tool call cannot follow reasoning: the block would open before the "
                "model has thought",
                hint="use mode='chat', or let grammar(tools) hold from the end of the reasoning",
            )
        self._renderer.calls.open_block(items)


def _random_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _without_tools(message: Message) -> Message:
    return replace(message, tools=()) if getattr(message, "tools", ()) else message  # pyright: ignore[reportCallIssue]


def _read_tools(tools: Sequence[Tool | Mapping[str, Any]]) -> tuple[Tool, ...]:
    read: list[Tool] = []
    for i, tool in enumerate(tools):
        if isinstance(tool, Tool):
            read.append(tool)
            continue
        function: Any = tool.get("function") if isinstance(tool, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if not isinstance(function, Mapping):
            raise InvalidConversationError(
                "expected an object with a `function`", where=f"tools[{i}]"
            )
        read.append(read_tool(function, f"tools[{i}].function"))
    return tuple(read)


def _check_choice(choice: ToolChoice) -> None:
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        raise ConfigError(
            f"unknown tool_choice: expected auto, none, required or a name, got {choice!r}"
        )

"""The streaming parser: a completion, in pieces of any size, to deltas and a message.

Parsing a whole completion is feeding it in one piece. What is held back is bounded: the beginning
of a possible tag, two line feeds before it, one tag header, or, for calls outside a proper block,
the call up to `RECOVERY_LIMIT`. Every character ends up in exactly one place: reasoning, content,
an argument, markup, or the text of a problem. docs/formats/encoding.md describes the rules.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal

from hadal.chat.messages import AssistantMessage, Tool
from hadal.chat.outcome import Problem, ProblemKind, Termination
from hadal.encoding.call_reader import RECOVERY_LIMIT, CallReader
from hadal.encoding.cursor import NEVER, SPACE, Span
from hadal.encoding.deltas import (
    ArgumentsDelta,
    ContentDelta,
    Delta,
    Overrun,
    ReasoningDelta,
    Section,
)
from hadal.encoding.tags import Tags
from hadal.encoding.tokens import DSML, EOS, THINK_END, THINK_START
from hadal.errors import ConfigError, EncodingError

__all__ = ["RECOVERY_LIMIT", "FinishReason", "Parser", "Span"]

FinishReason = Literal["stop", "length", "tool_calls", "abort"]

_STRAY_END_TAG: Final = re.compile(f'</{DSML}[^<>"\\n]{{0,32}}>')
_STRAY_END_TAG_BEGUN: Final = re.compile(f'</{DSML}[^<>"\\n]{{0,32}}\\Z')
_ESCAPED_BYTE: Final = re.compile("[\udc80-\udcff]+")
_LOOK_ALIKE: Final = re.compile(f"^[ \\t]*(?!</?{DSML})</?[|｜]{{1,3}}DSML", re.MULTILINE)
"""ASCII or doubled bars at the start of a line."""


class Parser(CallReader):
    """Parses one completion."""

    def __init__(
        self,
        tags: Tags,
        *,
        start: Section = "reasoning",
        tools: Sequence[Tool] | None = None,
        new_id: Callable[[], str],
        budgets: Mapping[Section, int] | None = None,
        decode_ids: Callable[[Iterable[int]], bytes] | None = None,
        check: Callable[[str], AssistantMessage] | None = None,
        record: bool = False,
    ) -> None:
        """Begin.

        Args:
            tags: Of the generation.
            start: Section in which the prompt left off.
            tools: Declared tools: calls outside a proper block are recovered only for these; an
                empty sequence means that calls are not enabled; None that nothing is known.
            new_id: Makes the id of a call.
            budgets: Characters after which a section is reported as overrun.
            decode_ids: Bytes of token ids, for `feed_ids`.
            check: Makes the message from the whole text instead (the strict face).
            record: Keep `spans`, for tests.
        """
        super().__init__(
            tags, start=start, tools=tools, new_id=new_id, budgets=budgets, record=record
        )
        self._decode_ids = decode_ids
        self._check = check
        self._whole: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._eos = False
        self._result: AssistantMessage | None = None
        self.last_deltas: list[Delta] = []
        """After `finish`: what had been held back and became certain only then."""

    # ---- feeding -----------------------------------------------------------------------------

    def feed(self, chunk: str | bytes) -> list[Delta]:
        """Take the next piece of the completion.

        Args:
            chunk: Text, or UTF-8 that may end within a character.

        Returns:
            What has become certain.

        Raises:
            EncodingError: The completion was finished before.
        """
        if self._result is not None:
            raise EncodingError("text was fed to a parser after finish()")
        if not isinstance(chunk, str):
            chunk = self._decoded(chunk, final=False)
        if self._check is not None:
            self._whole.append(chunk)
        if self._fast is not None and not self._buffer and "<" not in chunk:
            deltas = self._feed_plain(chunk)
            if deltas is not None:
                return deltas
        self._buffer += chunk
        return self._run()

    def feed_ids(self, ids: Iterable[int]) -> list[Delta]:
        """Take the next token ids of the completion; errors as for `feed`.

        Raises:
            ConfigError: There is no tokenizer.
        """
        if self._decode_ids is None:
            raise ConfigError("this parser has no tokenizer", hint="Encoding.load(tokenizer=...)")
        return self.feed(self._decode_ids(ids))

    def finish(self, finish_reason: FinishReason | None = None) -> AssistantMessage:
        """End the completion.

        Args:
            finish_reason: Why the engine stopped. None: only an end-of-sentence token in the text
                shows that the completion is whole.

        Returns:
            The message; calling again returns it again.

        Raises:
            ConfigError: Unknown reason.
            MalformedCompletionError: Strict face only: where the reference raises.
        """
        if self._result is not None:
            return self._result
        if finish_reason not in (None, "stop", "length", "tool_calls", "abort"):
            raise ConfigError(
                "unknown finish reason: expected stop, length, tool_calls, abort or None, "
                f"got {finish_reason!r}"
            )
        rest = self._decoded(b"", final=True)
        self._buffer += rest
        if self._check is not None:
            self._result = self._check("".join([*self._whole, rest]))
            return self._result
        self._final = True
        self.last_deltas = self._run()
        ended = self._eos or finish_reason in ("stop", "tool_calls")
        termination = self._terminate(ended)
        self.last_deltas += self._out
        self._result = AssistantMessage(
            content="".join(self._content),
            reasoning_content="".join(self._reasoning),
            tool_calls=tuple(self._calls),
            termination=termination,
            problems=tuple(sorted(self._problems, key=lambda p: p.offset)),
        )
        return self._result

    def _feed_plain(self, chunk: str) -> list[Delta] | None:
        """The common case without a search: no tag can begin or go on in this chunk."""
        if self._fast == "value":
            call = self._call
            assert call is not None
            self._raw.append(chunk)
            delta: Delta = ArgumentsDelta(call.index, call.add_value(chunk))
        elif "\n" in chunk:
            return None
        elif self._fast == "reasoning":
            self._reasoning.append(chunk)
            delta = ReasoningDelta(chunk)
        else:
            self._content.append(chunk)
            delta = ContentDelta(chunk)
        self._line_start = False
        self._base += len(chunk)
        if self._base > self._deadline:
            return [delta, self._overrun()]
        return [delta]

    def _run(self) -> list[Delta]:
        while self._state():
            pass
        self._base += self._at
        self._buffer = self._buffer[self._at :]
        self._at = 0
        if self._held is None:
            deltas, self._out = self._out, []
        else:  # what a call on trial would hand out stays behind
            offset, deltas, problems = self._held
            self._held = offset, [], problems
        if self._base > self._deadline:
            deltas.append(self._overrun())
        return deltas

    def _overrun(self) -> Delta:
        self._deadline = NEVER
        return Overrun(self.section, self._budgets[self.section])

    def _decoded(self, chunk: bytes, *, final: bool) -> str:
        text = self._utf8.decode(chunk, final)
        if text.isascii() or not _ESCAPED_BYTE.search(text):
            return text
        base = self._base + len(self._buffer)
        for found in _ESCAPED_BYTE.finditer(text):
            raw = found[0].encode("utf-8", "surrogateescape")
            self._problems.append(
                Problem(
                    ProblemKind.INVALID_UTF8,
                    base + found.start(),
                    f"not UTF-8: bytes {raw.hex(' ')}",
                )
            )
        return _ESCAPED_BYTE.sub(lambda found: "\ufffd" * len(found[0]), text)

    # ---- reasoning and content ---------------------------------------------------------------

    def _text(self) -> bool:
        if self._had_block and not self._said and self.section == "content":
            space = SPACE.match(self._buffer, self._at)
            assert space is not None
            self._take("markup", space.end())
        found = self._markers.in_text.search(self._buffer, self._at)
        if found is None:
            end = self._hold_from(self._markers.in_text_prefixes)
            self._say(end if self._final else self._before_newlines(end))
            return False
        token, at = found[0], found.start()
        if token == f"<{DSML}":
            return self._opener(at)
        if token == f"</{DSML}":
            return self._closer(at)
        if token == EOS:
            return self._end_of_turn(at)
        if token in (THINK_START, THINK_END):
            return self._think(token, at)
        self._say(at)
        self._note(ProblemKind.CONTROL_TOKEN_IN_TEXT, f"{token} in the {self.section}")
        self._say(found.end())
        return True

    def _think(self, token: str, at: int) -> bool:
        self._say(at)
        end = at + len(token)
        if token == THINK_END and self.section == "reasoning":
            self._take("markup", end)
            self._enter("content")
            return True
        begins = not self._said and not self._had_block
        if begins and not (token == THINK_START and self._reasoning):
            self._note(ProblemKind.DUPLICATE_THINK, f"{token} was there already")
            self._take("markup", end)
            if token == THINK_START and self.section == "content":
                self._enter("reasoning")
            return True
        self._note(ProblemKind.CONTROL_TOKEN_IN_TEXT, f"{token} in the {self.section}")
        self._say(end)
        return True

    def _end_of_turn(self, at: int) -> bool:
        if self.section != "calls":
            self._say(at)
        if self.section == "reasoning":
            self._note(ProblemKind.REASONING_NOT_CLOSED, "the turn ended within the reasoning")
        self._take("markup", at + len(EOS))
        self._eos = True
        self._fast = None
        self._state = self._ended
        return True

    def _ended(self) -> bool:
        while self._buffer.startswith(EOS, self._at):
            self._take("markup", self._at + len(EOS))
        if EOS.startswith(self._buffer[self._at :]) and not self._final:
            return False
        if self._at < len(self._buffer):
            self._broken = Problem(
                ProblemKind.TEXT_AFTER_END, self._offset, "text after the end of the turn"
            )
            self._raw.clear()
            self._state = self._rest
            return True
        return False

    def _rest(self) -> bool:
        self._take("malformed", len(self._buffer))
        return False

    def _opener(self, at: int) -> bool:
        """`<｜DSML｜` in text: a block, a call without one, or just text about them."""
        opening = self._markers.opening(self._buffer, at)
        if opening is None:
            if not self._final:
                self._say(self._before_newlines(at))
                return False
            opening = "text", 0
            rest = self._buffer[at:].rstrip()
            if self._starts_line(at) and self._markers.block_open.startswith(rest):
                self._open_block(at, at)  # cut off in or right after the wrapper's tag
                return False
        kind, length = opening
        starts_line = self._starts_line(at)
        unknown = self._tools is None
        if kind == "block" and (starts_line or unknown):
            self._open_block(at, at + len(self._markers.block_open))
        elif kind == "empty" and (starts_line or unknown):
            self._note(ProblemKind.EMPTY_BLOCK, "a block without a call", self._base + at)
            self._open_block(at, at + length)
            if self._broken is not None:
                self._close_broken()
            self._close_block()
        elif kind in ("block", "wrapper", "invoke") and self._tools:
            self._try(at, at + length)
        else:
            self._mention(at, at + 1 + len(DSML), starts_line=starts_line)
        return True

    def _mention(self, at: int, end: int, *, starts_line: bool) -> None:
        self._say(at)
        if starts_line and self.section == "content":
            self._note(ProblemKind.UNPARSED_MARKUP, "a tag that opens or closes no call")
        else:
            self._note(ProblemKind.QUOTED_MARKUP, "a tag within a line of text")
        self._say(end)

    def _closer(self, at: int) -> bool:
        """`</｜DSML｜` in text: left over after a recovered call, or just text."""
        if self._had_block and not self._said and at == self._at:
            stray = _STRAY_END_TAG.match(self._buffer, at)
            if stray is not None:
                self._take("markup", stray.end())
                return True
            if not self._final and _STRAY_END_TAG_BEGUN.match(self._buffer, at):
                return False
        self._mention(at, at + 2 + len(DSML), starts_line=self._starts_line(at))
        return True

    # ---- the end -----------------------------------------------------------------------------

    def _terminate(self, ended: bool) -> Termination:
        """Settle what is still open when nothing more will come."""
        if self._held is not None:
            self._take("content", self._before_eos())
            self._release()
            while self._state():
                pass
        ended = ended or self._eos or (self._call is not None and self._buffer.endswith(EOS))
        in_calls = self.section == "calls" or self._call is not None
        if self._broken is None and self._call is not None:
            kind = ProblemKind.MALFORMED_CALL if ended else ProblemKind.TRUNCATED_CALL
            self._fail_call("the turn ended within the call" if ended else "cut off", kind)
        elif self._broken is None and in_calls and self._at < len(self._buffer):
            kind = ProblemKind.JUNK_IN_BLOCK if ended else ProblemKind.TRUNCATED_CALL
            self._raw.clear()
            self._broken = Problem(kind, self._offset, "a tag that is not complete")
        elif self._broken is None and in_calls and ended:
            self._note(ProblemKind.UNCLOSED_BLOCK, "the turn ended before the block did")
        if self._broken is not None:
            self._take("malformed", self._before_eos() if in_calls else len(self._buffer))
            self._close_broken()
            self._take("markup", len(self._buffer))
        return self._verdict(ended, in_calls and not ended)

    def _before_eos(self) -> int:
        """The end of the buffer, without an end-of-sentence token that ends it."""
        return len(self._buffer) - (len(EOS) if self._buffer.endswith(EOS, self._at) else 0)

    def _verdict(self, ended: bool, cut_in_call: bool) -> Termination:
        if self.section == "reasoning" and ended and not self._eos:
            self._note(ProblemKind.REASONING_NOT_CLOSED, "the turn ended within the reasoning")
        look_alike = _LOOK_ALIKE.search("".join(self._content))
        if look_alike is not None:
            reason = f"the answer holds {look_alike[0].strip()!r}, which only looks like a tag"
            self._note(ProblemKind.UNPARSED_MARKUP, reason, self._content_from + look_alike.start())
        if any(problem.fatal for problem in self._problems):
            return Termination.MALFORMED
        if cut_in_call:
            return Termination.LENGTH_IN_CALL
        if self._calls:
            return Termination.TOOL_CALLS
        if ended:
            return Termination.STOP
        return (
            Termination.LENGTH_IN_REASONING
            if self.section == "reasoning"
            else Termination.LENGTH_IN_CONTENT
        )

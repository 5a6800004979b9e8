"""Blocks of calls within a completion: reading them, recovering them, giving up on them.

Each call is decided on its own: it is complete, or it is malformed with all of its text in the
problem. A call outside a proper block is on trial until it closes; it is accepted only if the tool
is declared, nothing but spacing is wrong with it and no required parameter is missing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from hadal.chat.messages import Tool
from hadal.chat.outcome import Problem, ProblemKind
from hadal.encoding.calls import OpenCall
from hadal.encoding.cursor import SPACE, Cursor
from hadal.encoding.deltas import ArgumentsDelta, CallEnd, CallFailed, CallStart, Section
from hadal.encoding.markers import KEY_LIMIT, NAME_LIMIT
from hadal.encoding.tags import Tags
from hadal.encoding.tokens import DSML, EOS

__all__ = ["RECOVERY_LIMIT", "CallReader"]

RECOVERY_LIMIT: Final = 1 << 18
"""Characters of a call outside a proper block that are held back until it closes."""


class CallReader(Cursor):
    """Reads from the opening tag of a block to its end."""

    def __init__(
        self,
        tags: Tags,
        *,
        start: Section,
        tools: Sequence[Tool] | None,
        new_id: Callable[[], str],
        budgets: Mapping[Section, int] | None,
        record: bool,
    ) -> None:
        super().__init__(
            tags, start=start, tools=tools, new_id=new_id, budgets=budgets, record=record
        )
        self._started = 0  # calls begun, complete or not
        self._call_name: str | None = None
        self._call_from = 0
        self._raw_from = 0
        self._gap_due = False
        self._reported_gap = False
        self._trial_gap = False
        self._trial_starts_line = False
        # The prompt of a forced call ends in the line feed that would be due here.
        self._had_block = start == "calls"
        self._state: Callable[[], bool] = self._block if start == "calls" else self._text

    def _text(self) -> bool:
        raise NotImplementedError

    def _end_of_turn(self, at: int) -> bool:
        raise NotImplementedError

    # ---- blocks ------------------------------------------------------------------------------

    def _leave_text(self, at: int) -> None:
        """Text ends here; the blank line before a block belongs to the block."""
        self._say(self._before_newlines(at))
        if self.section == "reasoning":
            self._note(
                ProblemKind.IMPLICIT_REASONING_END,
                "calls began within the reasoning",
                self._base + at,
            )
        elif self._had_block and not self._said:
            self._note(ProblemKind.TEXT_AFTER_CALLS, "a second block of calls", self._base + at)

    def _open_block(self, at: int, end: int) -> None:
        self._leave_text(at)
        enabled = self._tools is None or bool(self._tools)
        self._had_block = True
        self._enter("calls")
        if enabled:
            self._take("markup", end)
            self._expect(self._block)
            return
        self._broken = Problem(
            ProblemKind.CALLS_NOT_ENABLED, self._base + at, "calls in a request without tools"
        )
        self._raw.clear()
        self._take("malformed", end)
        self._state = self._disabled

    def _disabled(self) -> bool:
        return self._skip_to((self._markers.block_close, EOS))

    def _close_block(self) -> None:
        self._enter("content")
        self._state = self._text

    def _gap(self, expected: tuple[str, ...]) -> bool:
        """Skip whitespace before a tag; False if nothing else has arrived."""
        space = SPACE.match(self._buffer, self._at)
        assert space is not None
        if space.end() == len(self._buffer) and not self._final:
            if len(self._buffer) - self._at > len(expected[-1]):
                if self._gap_due:
                    self._loose()  # however much comes: none of it is held back
                self._gap_due = False
                self._take("markup", space.end())
            return False
        if space[0] not in expected and self._gap_due and space.end() < len(self._buffer):
            self._loose()
        self._gap_due = space.end() == len(self._buffer)
        self._take("markup", space.end())
        return space.end() < len(self._buffer)

    def _expect(self, state: Callable[[], bool]) -> None:
        """Go on where a tag is due, after the whitespace that belongs before it."""
        self._state = state
        self._gap_due = True

    def _loose(self) -> None:
        if not self._reported_gap:
            self._note(ProblemKind.LOOSE_WHITESPACE, "expected one line feed between tags")
        self._reported_gap = True

    def _block(self) -> bool:
        if not self._gap(("\n",)):
            return False
        buffer, at, markers = self._buffer, self._at, self._markers
        if buffer.startswith(markers.invoke_open, at):
            self._open_call(at + len(markers.invoke_open))
        elif buffer.startswith(markers.block_close, at):
            self._take("markup", at + len(markers.block_close))
            self._close_block()
        elif buffer.startswith(EOS, at):
            self._note(ProblemKind.UNCLOSED_BLOCK, "the turn ended before the end of the block")
            return self._end_of_turn(at)
        elif buffer[at : at + 60] in markers.in_block_prefixes:
            return False
        else:
            self._raw.clear()
            self._broken = Problem(
                ProblemKind.JUNK_IN_BLOCK, self._offset, "expected a call or the end of the block"
            )
            self._state = self._junk
        return True

    def _junk(self) -> bool:
        markers = self._markers
        return self._skip_to((markers.invoke_open, markers.block_close, EOS))

    def _skip_to(self, stops: tuple[str, ...]) -> bool:
        """Give up on everything up to one of these tags, at which parsing goes on."""
        buffer = self._buffer
        found = [i for stop in stops if (i := buffer.find(stop, self._at)) >= 0]
        if not found:
            self._take("malformed", self._hold_from(self._markers.resync_prefixes))
            return False
        self._take("malformed", min(found))
        self._close_broken()
        self._state = self._block  # what whitespace was due here is moot
        self._gap_due = False
        return True

    def _close_broken(self) -> None:
        broken, self._broken = self._broken, None
        assert broken is not None
        text = "".join(self._raw)
        self._raw.clear()
        problem = Problem(
            broken.kind, broken.offset, broken.reason, text, broken.name, broken.arguments
        )
        self._problems.append(problem)
        if self._call is not None:
            self._out.append(CallFailed(self._call.index, problem))
            self._call = None

    # ---- calls -------------------------------------------------------------------------------

    def _try(self, at: int, end: int) -> None:
        """A call outside a proper block: read it, and decide when it has closed."""
        self._say(self._before_newlines(at))
        self._raw.clear()
        self._raw_from = len(self.spans)
        self._held = (self._offset, self._out, self._problems)
        self._fast = None
        self._trial_starts_line = self._starts_line(at)
        self._trial_gap = self._reported_gap
        self._out, self._problems = [], []
        self._take("markup", end)
        self._open_call(end + len(self._markers.invoke_open))

    def _release(self) -> bool:
        """The call on trial is none: all of it was text."""
        assert self._held is not None
        offset, self._out, self._problems = self._held
        text = "".join(self._raw)
        self._held = self._call = None
        self._raw.clear()
        if self._call_name is not None:
            self._started -= 1
        self._reported_gap = self._trial_gap
        if self._record:
            del self.spans[self._raw_from :]
            self.spans.append((self.section, offset, self._offset))
        fatal = self._trial_starts_line and self.section == "content"
        kind = ProblemKind.UNPARSED_MARKUP if fatal else ProblemKind.QUOTED_MARKUP
        self._note(kind, "a call outside a block that cannot be accepted", offset)
        self._utter(text)
        self._state = self._text
        return True

    def _recover(self, call: OpenCall) -> None:
        """The call on trial is closed, declared and has all it needs."""
        assert self._held is not None
        offset, out, problems = self._held
        out += self._out
        problems += self._problems
        self._out, self._problems, self._held = out, problems, None
        self._note(ProblemKind.RECOVERED_CALL, f"a call of {call.name!r} outside a block", offset)
        if self.section == "reasoning":
            self._note(
                ProblemKind.IMPLICIT_REASONING_END, "calls began within the reasoning", offset
            )
        self._had_block = True

    def _open_call(self, end: int) -> None:
        if self._held is None:
            self._raw.clear()
            self._raw_from = len(self.spans)
        self._call_from = self._offset
        self._call_name = None
        self._call = OpenCall(self._started, "", "", None)
        self._take("markup", end)
        self._state = self._name

    def _name(self) -> bool:
        limit = self._at + NAME_LIMIT + 2
        end = self._buffer.find('">', self._at, limit)
        if end < 0:
            if len(self._buffer) < limit and not self._final:
                return False
            return (
                self._fail_call("the name of the tool does not end") if not self._final else False
            )
        name = self._buffer[self._at : end]
        if "\n" in name or DSML in name:
            return self._fail_call('expected name="..." in one line')
        tool = self._tools.get(name) if self._tools else None
        if self._held is not None and tool is None:
            return self._release()
        self._take("markup", end + 2)
        self._call = OpenCall(self._started, self._new_id(), name, tool)
        if self._tools and tool is None:
            self._note(ProblemKind.UNDECLARED_TOOL, f"no tool {name!r} was declared")
        self._out.append(CallStart(self._call.index, self._call.id, name))
        self._call_name = name
        self._started += 1
        self._expect(self._invoke)
        return True

    def _hand_out(self, text: str) -> None:
        call = self._call
        assert call is not None
        if text and not call.deferred:
            self._out.append(ArgumentsDelta(call.index, text))

    def _invoke(self) -> bool:
        call, markers = self._call, self._markers
        assert call is not None
        if not self._gap(("\n",) if call.keys else ("\n", "\n\n")):
            return False
        buffer, at = self._buffer, self._at
        if buffer.startswith(markers.parameter_open, at):
            return self._header(at + len(markers.parameter_open))
        if buffer.startswith(markers.invoke_close, at):
            return self._close_call(at + len(markers.invoke_close))
        if buffer.startswith(markers.block_close, at) and self._held is None:
            self._note(ProblemKind.UNCLOSED_INVOKE, "the block ended before the call did")
            return self._close_call(at)
        if buffer[at : at + 60] in markers.in_invoke_prefixes:
            return False
        return self._fail_call("expected a parameter or the end of the call")

    def _header(self, start: int) -> bool:
        header = self._header_at(start)
        if header is None:
            return False
        call = self._call
        assert call is not None
        if isinstance(header, str):
            return self._fail_call(header)
        key = header[1]
        if key in call.keys:
            return self._fail_call(f"parameter {key[:80]!r} came twice")
        self._take("markup", start + header.end())
        if call.deferred:
            self._hand_out(call.undefer())
        added = call.open_parameter(key, is_string=header[2] == "true")
        self._hand_out(added)
        self._state = self._value
        plain = call.is_string and not call.deferred and self._held is None and not self._record
        self._fast = "value" if plain else None
        return True

    def _header_at(self, start: int) -> re.Match[str] | str | None:
        """The rest of a parameter's opening tag; what is wrong with it; None if not all is here."""
        rest = self._buffer[start : start + KEY_LIMIT + 20]
        header = self._markers.header.match(rest)
        if header is None:
            ends = len(rest) >= KEY_LIMIT + 20 or DSML in rest
            wrong = 'expected name="..." string="true|false">'
            return wrong if ends else None
        if DSML in header[1]:
            return 'expected name="..." string="true|false">'
        return header

    def _value(self) -> bool:
        call, markers, buffer = self._call, self._markers, self._buffer
        assert call is not None
        found = markers.in_value.search(buffer, self._at)
        if found is None:
            end = self._hold_from(markers.in_value_prefixes)
            if self._final and buffer.endswith(EOS):
                end = len(buffer) - len(EOS)
            self._add_value(end)
            over = self._held is not None and self._offset - self._held[0] > RECOVERY_LIMIT
            return self._release() if over else False
        if found[0] == markers.parameter_close:
            self._add_value(found.start())
            self._take("markup", found.end())
            return self._close_parameter()
        # An opening tag: it closes this parameter if it really opens one that may follow.
        header = self._header_at(found.end())
        if header is None and not self._final:
            self._add_value(found.start())
            return False
        key = None if header is None or isinstance(header, str) else header[1]
        if key is not None and key not in call.keys and call.knows(key):
            self._add_value(found.start())
            self._note(ProblemKind.UNCLOSED_PARAMETER, "the next parameter began before its end")
            return self._close_parameter()
        self._add_value(found.end())
        return True

    def _add_value(self, end: int) -> None:
        if end > self._at:
            call = self._call
            assert call is not None
            self._hand_out(call.add_value(self._take("argument", end)))

    def _close_parameter(self) -> bool:
        call = self._call
        assert call is not None
        self._fast = None
        added, fault = call.close_parameter()
        if fault is not None:
            return self._fail_call(f'string="false" needs JSON: {fault}')
        self._hand_out(added)
        self._expect(self._invoke)
        return True

    def _close_call(self, end: int) -> bool:
        call = self._call
        assert call is not None
        if call.deferred:
            if call.unwrap():
                self._note(
                    ProblemKind.UNWRAPPED_ARGUMENTS, "the arguments came inside one parameter"
                )
            self._hand_out(call.undefer())
        self._take("markup", end)
        if self._held is not None:
            if self._distrusted() or call.lacks_required():
                return self._release()
            self._hand_out(call.close())
            self._recover(call)
            recovered = True
        else:
            self._hand_out(call.close())
            recovered = False
        self._calls.append(call.finished())
        self._out.append(CallEnd(call.index))
        self._call = None
        self._raw.clear()
        if recovered:
            self._close_block()
        else:
            self._expect(self._block)
        return True

    def _distrusted(self) -> bool:
        """Whether anything but spacing was wrong with the call on trial."""
        return any(p.kind is not ProblemKind.LOOSE_WHITESPACE for p in self._problems)

    def _fail_call(self, reason: str, kind: ProblemKind = ProblemKind.MALFORMED_CALL) -> bool:
        """The call is malformed: its text goes into the problem, up to where a call can begin."""
        self._fast = None
        if self._held is not None:
            return self._release()
        call = self._call
        assert call is not None
        name = self._call_name
        if name is None:
            self._call = None  # nothing was handed out for it
        self._broken = Problem(
            kind, self._call_from, reason, "", name, call.salvaged() if name is not None else None
        )
        if self._record:
            del self.spans[self._raw_from :]
            if self._offset > self._call_from:
                self.spans.append(("malformed", self._call_from, self._offset))
        self._state = self._junk
        return True

"""The published reference's parser for whole completions: the strict face of decoding.

It accepts well-formed text only, and it accepts exactly what the reference does: a value that is
not JSON is pasted as it is, a value ends at the text `/｜DSML｜parameter`, the end-of-sentence token is
not looked for within values. For anything that serves users, see `parser`.
"""

import re

from hadal.chat.messages import AssistantMessage, ToolCall
from hadal.chat.outcome import Termination
from hadal.encoding.calls import escape
from hadal.encoding.tags import DSML, Tags
from hadal.encoding.tokens import BOS, EOS, THINK_END, THINK_START
from hadal.errors import MalformedCompletionError

__all__ = ["parse_reference"]

# Without re.M, `$` also matches before one last line feed: the reference accepts it too.
_NAME = re.compile(r' name="(.*?)">\n$', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*?)<$', re.DOTALL)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def until(self, *stops: str) -> tuple[str, str | None]:
        """Text up to the first of these, and which; the stop itself is skipped."""
        found = [(i, stop) for stop in stops if (i := self.text.find(stop, self.at)) >= 0]
        start = self.at
        if not found:
            self.at = len(self.text)
            return self.text[start:], None
        end, stop = min(found)
        self.at = end + len(stop)
        return self.text[start:end], stop

    def fail(self, reason: str, found: str = "") -> MalformedCompletionError:
        return MalformedCompletionError(reason, offset=self.at, text=found)


def parse_reference(text: str, *, thinking: bool, tags: Tags) -> AssistantMessage:
    """Parse a whole completion, end-of-sentence token included.

    Raises:
        MalformedCompletionError: Wherever the reference raises.
    """
    reader = _Reader(text)
    block_open = f"\n\n<{DSML}{tags.block}"
    reasoning = ""
    if thinking:
        reasoning, stop = reader.until(THINK_END, block_open)
        if stop != THINK_END:
            raise reader.fail("expected </think> before the answer and the calls")
    content, stop = reader.until(EOS, block_open)
    if stop is None:
        raise reader.fail("expected the end-of-sentence token after the answer")
    calls: list[ToolCall] = []
    if stop == block_open:
        calls = _calls(reader, tags)
        between, _ = reader.until(EOS)
        if between:
            raise reader.fail("expected the end of the turn after the calls", between)
    if reader.at != len(text):
        raise reader.fail("expected nothing after the end-of-sentence token", text[reader.at :])
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        if token in content or token in reasoning:
            raise reader.fail(f"unexpected {token} in the text")
    end = Termination.TOOL_CALLS if calls else Termination.STOP
    return AssistantMessage(content, reasoning, tuple(calls), termination=end)


def _calls(reader: _Reader, tags: Tags) -> list[ToolCall]:
    calls: list[ToolCall] = []
    invoke_open, block_close = f"<{DSML}{tags.invoke}", f"</{DSML}{tags.block}>"
    while True:
        between, stop = reader.until(invoke_open, block_close)
        if between != ">\n" or stop is None:
            raise reader.fail("expected '>' and a line feed before the next call", between)
        if stop == block_close:
            return calls
        calls.append(_call(reader, tags))


def _call(reader: _Reader, tags: Tags) -> ToolCall:
    parameter_open, invoke_close = f"<{DSML}{tags.parameter}", f"</{DSML}{tags.invoke}"
    header, stop = reader.until(parameter_open, invoke_close)
    name = _NAME.match(header)
    if name is None or stop is None:
        raise reader.fail('expected name="..." and a line feed', header)
    parameters: dict[str, str] = {}
    while stop == parameter_open:
        body, end = reader.until(f"/{DSML}{tags.parameter}")
        found = _PARAMETER.match(body)
        if found is None or end is None:
            raise reader.fail('expected name="..." string="true|false">value', body)
        key, is_string, value = found.groups()
        if key in parameters:
            raise reader.fail("duplicate parameter", key)
        parameters[key] = f'"{escape(value)}"' if is_string == "true" else value
        between, stop = reader.until(parameter_open, invoke_close)
        if between != ">\n" or stop is None:
            raise reader.fail("expected '>' and a line feed after a parameter", between)
    body = ", ".join(f'"{escape(key)}": {value}' for key, value in parameters.items())
    return ToolCall(name[1], f"{{{body}}}")

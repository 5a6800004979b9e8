"""Completions of every kind for the parser: valid, mutated, truncated, adversarial.

Used by the property tests at a small count and by `scripts/fuzz_encoding.py` at the full one, so it
draws from `random.Random` and not from a test library.
"""

import itertools
from dataclasses import dataclass

from hadal.chat import ProblemKind, Tool
from hadal.encoding.deltas import (
    ArgumentsDelta,
    CallEnd,
    CallFailed,
    CallStart,
    ContentDelta,
    ReasoningDelta,
)
from hadal.encoding.parser import Parser
from hadal.encoding.tags import DSML, V4_TAGS, V41_TAGS

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {}},
    "required": ["a"],
}
TOOLS = (Tool.of("f", "does f", SCHEMA), Tool.of("g"))


def block(tags, value="v<1>", name="f", key="a", flag="true"):
    return (
        f'\n\n{tags.block_open}\n{tags.invoke_open_prefix}{name}">\n'
        f'{tags.parameter_open_prefix}{key}" string="{flag}">{value}{tags.parameter_close}\n'
        f"{tags.invoke_close}\n{tags.block_close}"
    )


def fragments(tags):
    opens = [
        f'{tags.parameter_open_prefix}{k}" string="{flag}">'
        for k in ("a", "b", "arguments")
        for flag in ("true", "false")
    ]
    return [
        *opens,
        *(f'{tags.invoke_open_prefix}{n}">' for n in ("f", "g", "h")),
        tags.invoke_open_prefix, tags.parameter_open_prefix, tags.block_open, tags.block_close,
        tags.invoke_close, tags.parameter_close, tags.parameter_close[:-1],
        V41_TAGS.block_open, "<｜DSML｜toolcalls>", "<|DSML|tool_calls>", f"<{DSML}", f"</{DSML}",
        DSML, "<think>", "</think>", "<｜end▁of▁sentence｜>", "<｜User｜>", "\n", "\n\n", " ", "<", "</",
        ">", '"', '" string="true">', "x", "two words", "é", "😀", "{", "}", '{"a": "x"}', "1",
        "null", "[", "\x00", block(tags), block(tags, '{"a": "x"}', key="arguments", flag="false"),
    ]  # fmt: skip


def draw_text(rng, tags):
    parts = fragments(tags)
    if rng.random() < 0.6:
        return "".join(rng.choice(parts) for _ in range(rng.randint(0, 14)))
    whole = "because</think>Let me look." + block(tags) + rng.choice(["", "<｜end▁of▁sentence｜>"])
    at, other = rng.randrange(len(whole)), rng.choice(parts)
    end = at + rng.randint(1, 24)
    return rng.choice(
        [whole, whole[:at], whole[:at] + other + whole[at:], whole[:at] + whole[end:],
         whole[:at] + other + whole[end:], whole[:at] + whole[at:end] + whole[at:]]
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    text: str
    tags: object
    start: str
    tools: tuple | None
    finish_reason: str | None


def draw_case(rng):
    tags = V41_TAGS if rng.random() < 0.2 else V4_TAGS
    return Case(
        draw_text(rng, tags),
        tags,
        rng.choice(["reasoning", "reasoning", "content", "calls"]),
        rng.choice([None, (), TOOLS]),
        rng.choice([None, "stop", "length"]),
    )


def draw_pieces(rng, text):
    kind = rng.randrange(4)
    if kind == 0:
        return list(text)
    if kind == 1:
        return [bytes([byte]) for byte in text.encode()]
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randint(0, 8)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


def parse(case, pieces, *, record):
    """The parser after `finish`, the message, and all deltas."""
    ids = itertools.count()
    parser = Parser(
        case.tags,
        start=case.start,
        tools=case.tools,
        new_id=lambda: f"call_{next(ids)}",
        record=record,
    )
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    message = parser.finish(case.finish_reason)
    return parser, message, deltas + parser.last_deltas


def fold(deltas):
    """What a client makes of deltas: reasoning, content, complete calls; it also checks order."""
    reasoning, content, open_calls, complete = "", "", {}, []
    for delta in deltas:
        match delta:
            case ReasoningDelta(text):
                reasoning += text
            case ContentDelta(text):
                content += text
            case CallStart(index, call_id, name):
                assert index not in open_calls
                open_calls[index] = [call_id, name, ""]
            case ArgumentsDelta(index, text):
                open_calls[index][2] += text
            case CallEnd(index):
                complete.append(tuple(open_calls[index]))
            case CallFailed(index):
                assert index in open_calls
    return reasoning, content, complete


def check(case, pieces):
    """Streamed equals whole, deltas add up to the message, and every character is somewhere."""
    parser, whole, _ = parse(case, [case.text], record=True)
    for record in (False, True):
        _, message, deltas = parse(case, pieces, record=record)
        assert message == whole
        calls = [(c.id, c.name, c.arguments) for c in message.tool_calls]
        assert fold(deltas) == (message.reasoning_content, message.content, calls)
    at = 0
    found = {"reasoning": "", "content": "", "malformed": "", "argument": "", "markup": ""}
    for kind, start, end in parser.spans:
        assert start == at < end
        found[kind] += case.text[start:end]
        at = end
    assert at == len(case.text)
    assert found["reasoning"] == whole.reasoning_content
    assert found["content"] == whole.content
    assert found["malformed"] == "".join(p.text for p in whole.problems)
    assert all(call.parsed() is not None for call in whole.tool_calls)
    assert (whole.termination == "malformed") == any(p.fatal for p in whole.problems)
    if whole.termination == "stop":
        kinds = {p.kind for p in whole.problems}
        assert not whole.tool_calls
        assert not kinds & {ProblemKind.TRUNCATED_CALL}
    return whole

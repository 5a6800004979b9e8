"""Parsing: the reference's verdicts in the strict face, other parsers' cases in the default one."""

import json

import pytest

from hadal.chat import ProblemKind, Termination
from hadal.encoding import Encoding
from hadal.errors import MalformedCompletionError
from tests.golden.data import HERE, SHARED, cases, needs_shared

STRICT = Encoding.load("v4", strict=True)
DEFAULT = Encoding.load("v4")

BETTER = {
    "bad-json-fallback": "a value that is not JSON is no string either: the call is malformed, and "
    "its text is in the problem",
}
"""Where our result differs from the listed one, and why it is the better one."""


def as_reference(message):
    calls = [
        {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in message.tool_calls
    ]
    return {
        "role": "assistant",
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls,
    }


@pytest.mark.parametrize("case", cases(HERE / "generated/parse.jsonl"))
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_strict_equals_the_reference(case, size):
    parser = STRICT.stream(case["thinking_mode"])
    for i in range(0, len(case["text"]), size):
        parser.feed(case["text"][i : i + size])
    if "expected" in case:
        assert as_reference(parser.finish()) == case["expected"]
    else:
        with pytest.raises(MalformedCompletionError):
            parser.finish()


@pytest.mark.parametrize("case", cases(HERE / "generated/parse.jsonl"))
def test_default_agrees_wherever_the_reference_accepts_valid_calls(case):
    message = DEFAULT.parse(case["text"], case["thinking_mode"])
    if case["id"] == "raw-bad-json":
        assert message.termination is Termination.MALFORMED
        assert message.problems[0].text.startswith('<｜DSML｜invoke name="f">')
    elif "expected" in case:
        assert as_reference(message) == case["expected"]
    elif message.termination in (Termination.STOP, Termination.TOOL_CALLS):
        harmless = {p.kind for p in message.problems}
        mention = case["id"] in ("dsml-mention", "value-with-close-name")
        assert mention or harmless


def starts(case):
    either = case["initial_state"] == "either"
    return ["reasoning", "content"] if either else [case["initial_state"]]


@needs_shared
@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(
    "case",
    cases(SHARED / "parsers/vllm-cases.jsonl") + cases(SHARED / "parsers/deepseek-recipe-cases.jsonl"),
)  # fmt: skip
def test_cases_of_other_parsers(case, size):
    encoding = Encoding.load("v4.1" if case["id"].startswith("v41") else "v4")
    text, expected = case["text"], case["expected"]
    for start in starts(case):
        parser = encoding.stream(start=start, tools=case.get("tools"))
        for i in range(0, len(text), size):
            parser.feed(text[i : i + size])
        message = parser.finish("stop")
        if case["id"] in BETTER:
            fault = next(p for p in message.problems if p.fatal)
            assert fault.kind is ProblemKind.MALFORMED_CALL
            assert fault.text in text
            continue
        check(message, expected, text)


def check(message, expected, text):
    calls = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in message.tool_calls]
    known = {
        "tool_calls": calls,
        "content": message.content,
        "reasoning": message.reasoning_content,
    }
    for key, value in expected.items():
        if key == "content_is_input":
            assert message.content == text
        elif key == "finish_reason":
            assert message.termination.finish_reason == value
        elif key.endswith("_contains"):
            assert value in known[key.removesuffix("_contains")]
        else:
            assert known[key] == (value if value is not None else "")

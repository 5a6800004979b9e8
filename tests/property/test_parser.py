"""parse(x) is the fold of the stream over any chunking, and no character is lost."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.encoding import Encoding
from tests.property.completions import check, draw_case, draw_pieces


@pytest.mark.parametrize("seed", range(40))
def test_fuzzed_completions(seed):
    rng = random.Random(seed)
    for _ in range(150):
        case = draw_case(rng)
        check(case, draw_pieces(rng, case.text))


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text(max_size=40), st.integers(0, 5))
def test_any_text_is_conserved(left, right, size):
    rng = random.Random(size)
    case = draw_case(rng)
    text = (left + case.text + right).replace("\r", "")
    text = text.encode("utf-8", "replace").decode()
    check(type(case)(text, case.tags, case.start, case.tools, case.finish_reason), list(text))


KEYS = st.text(max_size=12).filter(lambda s: '"' not in s and "｜" not in s)
STRINGS = st.text().filter(lambda s: "｜DSML｜" not in s)
VALUES = st.recursive(
    STRINGS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    content=STRINGS,
    reasoning=STRINGS,
    calls=st.lists(st.tuples(st.sampled_from(["f", "get_x"]), st.dictionaries(KEYS, VALUES)), max_size=3),
    generation=st.sampled_from(["v4", "v4-0731", "v4.1"]),
)  # fmt: skip
def test_what_is_rendered_parses_back(content, reasoning, calls, generation):
    content = content.replace("<", "").replace("|", "")
    reasoning = reasoning.replace("<", "").encode("utf-8", "replace").decode()
    content = content.encode("utf-8", "replace").decode()
    encoding = Encoding.load(generation)
    turn = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [
            {"id": str(i), "function": {"name": n, "arguments": json.dumps(a)}}
            for i, (n, a) in enumerate(calls)
        ],
    }
    text = encoding.render([{"role": "user", "content": "q"}, turn], drop_thinking=False)
    completion = text.split("<｜Assistant｜><think>", 1)[1]
    message = encoding.parse(completion)
    assert message.problems == ()
    assert message.termination == ("tool_calls" if calls else "stop")
    assert (message.content, message.reasoning_content) == (content, reasoning)
    assert [c.name for c in message.tool_calls] == [n for n, _ in calls]
    assert [c.parsed() for c in message.tool_calls] == [json.loads(json.dumps(a)) for _, a in calls]


def test_cost_is_linear_in_hostile_input():
    """Steps, not seconds: the parser touches each character a bounded number of times."""
    import sys

    def steps(text):
        parser = Encoding.load("v4").stream(start="content", tools=[])
        count = 0

        def trace(frame, event, _):
            nonlocal count
            count += event == "call"

        sys.setprofile(trace)
        try:
            for i in range(0, len(text), 3):
                parser.feed(text[i : i + 3])
            parser.finish()
        finally:
            sys.setprofile(None)
        return count

    for piece in ("<", "\n", "<｜DSML｜", '<｜DSML｜invoke name="f">', "</｜DSML｜tool_calls>\n"):
        assert steps(piece * 400) < 2.5 * steps(piece * 200)

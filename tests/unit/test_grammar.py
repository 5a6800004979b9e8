"""The grammar accepts every call that we render and refuses what the format refuses."""

import json
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.chat import NamedToolChoice, Tool
from hadal.encoding import Encoding
from hadal.encoding.grammar import EXACT_PARAMETERS, write_grammar
from hadal.encoding.tags import V4_TAGS, V41_TAGS
from hadal.errors import ConfigError, InvalidConversationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.testing import _is_grammar_accept_string

TYPES = {
    "string": st.text().filter(lambda s: "｜DSML｜" not in s and s == s.encode("utf-8", "replace").decode()),
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
    "null": st.none(),
    "array": st.lists(st.integers() | st.text("ab<\"\\\n/é")),
    "object": st.dictionaries(st.text("ab<é"), st.booleans() | st.text("</x")),
}  # fmt: skip


@st.composite
def tools_and_calls(draw):
    tools, calls = [], []
    for i in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(sorted(TYPES)), max_size=8))
        names = [f"p{j}" for j in range(len(kinds))]
        needed = [n for n in names if draw(st.booleans())]
        properties = {n: {"type": k} for n, k in zip(names, kinds, strict=True)}
        schema = {"type": "object", "properties": properties, "required": needed}
        schema["additionalProperties"] = False
        tools.append(Tool.of(f"tool_{i}", "", schema))
        given_names = [n for n in names if n in needed or draw(st.booleans())]
        order = draw(st.permutations(given_names))
        arguments = {n: draw(TYPES[properties[n]["type"]]) for n in order}
        calls.append((f"tool_{i}", arguments))
    return tools, draw(st.lists(st.sampled_from(calls), min_size=1, max_size=3))


def rendered(calls, generation="v4"):
    turn = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls],
    }
    text = Encoding.load(generation).render([{"role": "user", "content": "q"}, turn], mode="chat")
    return text.split("</think>\n\n", 1)[1].removesuffix("<｜end▁of▁sentence｜>")


def accepts(grammar, text):
    return _is_grammar_accept_string(xgrammar.Grammar.from_ebnf(grammar.ebnf), text)


@settings(max_examples=60, deadline=None)
@given(tools_and_calls(), st.sampled_from(["v4", "v4.1"]))
def test_every_rendered_call_is_accepted(drawn, generation):
    tools, calls = drawn
    assert accepts(Encoding.load(generation).grammar(tools), rendered(calls, generation))


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "n": {"type": "integer"},
        "e": {"enum": ["x", "y", 1]},
        "u": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "r": {"$ref": "#/$defs/flag"},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}
TOOLS = [
    Tool.of("f", "", SCHEMA),
    Tool.of("g", "", {"type": "object", "additionalProperties": False}),
]
GRAMMAR = write_grammar(TOOLS, V4_TAGS)
GOOD = rendered([("f", {"a": "x", "n": 3, "e": "y", "u": None, "r": True}), ("g", {})])


def test_the_mutants_come_from_an_accepted_text():
    assert accepts(GRAMMAR, GOOD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tool_calls>\n", "tool_calls>"),
        ("tool_calls>", "function_calls>"),
        ('"f">\n', '"f">'),
        ('invoke name="f"', 'invoke name="h"'),
        ('"a" string="true"', '"a" string="false"'),
        ('"n" string="false"', '"n" string="true"'),
        ('"n" string="false">3', '"n" string="false">3.5'),
        ('"n"', '"z"'),
        ('"n"', '"a"'),
        ("y</", "z</"),
        ("true</｜", "1</｜"),
        ('<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n', ""),
        ("</｜DSML｜invoke>\n<", "</｜DSML｜invoke>\n\n<"),
        ("</｜DSML｜invoke>\n<", "</｜DSML｜invoke><"),
        ("</｜DSML｜parameter>", "</｜DSML｜parameter"),
        ("</｜DSML｜tool_calls>", "</｜DSML｜tool_calls>\n"),
        ("</｜DSML｜tool_calls>", ""),
        ('"g">\n\n', '"g">\n'),
        ("｜DSML｜", "|DSML|"),
    ],
)
def test_mutants_are_refused(old, new):
    assert old in GOOD
    assert not accepts(GRAMMAR, GOOD.replace(old, new))


def test_truncations_are_refused():
    rng = random.Random(0)
    assert not any(accepts(GRAMMAR, GOOD[: rng.randrange(len(GOOD))]) for _ in range(50))


@pytest.mark.parametrize(
    "value",
    ["</", "</｜DSML｜param", "<<</｜DSML｜parameter", "\n\n", '"', "é😀", "", "</｜DSML｜invoke>"],
)
def test_values_are_any_text_but_the_end_tag(value):
    assert accepts(GRAMMAR, rendered([("f", {"a": value})]))


def test_one_call_only():
    grammar = write_grammar(TOOLS, V4_TAGS, parallel=False)
    assert accepts(grammar, rendered([("g", {})]))
    assert not accepts(grammar, rendered([("g", {}), ("g", {})]))


def test_free_tools_take_any_parameter():
    grammar = write_grammar([Tool.of("f")], V41_TAGS)
    assert accepts(grammar, rendered([("f", {"whatever": "x", "n": [1]})], "v4.1"))


def test_many_parameters_stay_linear():
    def size(count):
        properties = {f"p{i}": {"type": "string"} for i in range(count)}
        return len(write_grammar([Tool.of("f", "", {"properties": properties})], V4_TAGS).ebnf)

    assert size(60) - size(40) == pytest.approx(size(40) - size(20), rel=0.02)
    assert EXACT_PARAMETERS < 20


def test_structural_tag_compiles_and_follows_free_text():
    tag = GRAMMAR.structural_tag
    grammar = xgrammar.Grammar.from_structural_tag(tag)
    assert _is_grammar_accept_string(grammar, f"Let me look.\n\n{GOOD}")
    assert _is_grammar_accept_string(grammar, "no call at all")
    unknown = GOOD.replace('"f"', '"h"')
    assert not _is_grammar_accept_string(grammar, f"Let me look.\n\n{unknown}")
    must = write_grammar(TOOLS, V4_TAGS, required=True).structural_tag
    assert not _is_grammar_accept_string(xgrammar.Grammar.from_structural_tag(must), "no call")


@pytest.mark.parametrize(
    "tools", [[], [Tool.of("f"), Tool.of("f")], [Tool.of('a"b')], [Tool.of("f", "", {"properties": {'"': {}}})]]
)  # fmt: skip
def test_what_the_markup_cannot_hold_is_refused(tools):
    with pytest.raises(InvalidConversationError):
        write_grammar(tools, V4_TAGS)


@pytest.mark.parametrize(
    ("choice", "error", "match"),
    [
        ("none", ConfigError, "has no grammar"),
        ("always", ConfigError, "unknown tool_choice"),
        (NamedToolChoice("h"), InvalidConversationError, "not declared"),
    ],
)
def test_choices_without_a_grammar(choice, error, match):
    with pytest.raises(error, match=match):
        Encoding.load("v4").grammar([Tool.of("f")], tool_choice=choice)

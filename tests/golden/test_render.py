"""Rendering is byte-exact with the published reference, and the default face fixes its defects."""

import json

import pytest

from hadal.encoding import Encoding
from hadal.errors import EncodingError, HadalError
from tests.golden.data import HERE, SHARED, cases, needs_shared, settings

STRICT = {name: Encoding.load(name, strict=True) for name in ("v4", "v4-0731", "v4.1")}
DEFAULT = {name: Encoding.load(name) for name in STRICT}

FIXED = {
    "system-then-assistant": "SYS<｜Assistant｜></think>Hello there",
    "assistant-assistant": "a1<｜end▁of▁sentence｜><｜Assistant｜><think>r2</think>a2",
    "toolcalls-without-tools": "<think>r1</think>",
    "user-content-list": "<｜User｜>hi<｜Assistant｜>",
    "user-content-null": "<｜User｜><｜Assistant｜>",
    "system-content-list": "<｜begin▁of▁sentence｜>hi<｜User｜>",
    "reminder-after-user": "SYS<｜latest_reminder｜>2026-02-21<｜User｜>q<｜Assistant｜><think>",
    "args-empty-string": '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>',
    "args-list": 'name="arguments" string="true">[1]</',
}
"""Where the default face differs by design, and what it writes instead."""

REFUSED = {
    "tools-on-user": "tools",
    "tools-strict-extra-keys": "tools[0].x",
    "response-format-user": "response_format",
    "user-wo-eos-ignored": "wo_eos",
    "tool-content-list": "content[1]",
}
"""What the reference loses without a word, the default face refuses; the error names the place."""


@pytest.mark.parametrize("case", cases(HERE / "generated/encode.jsonl"))
def test_strict_equals_the_reference(case):
    check(STRICT["v4"], case)


@pytest.mark.parametrize("case", cases(HERE / "generated/effort-0731.jsonl"))
@pytest.mark.parametrize("faces", [STRICT, DEFAULT], ids=["strict", "default"])
def test_effort_0731(case, faces):
    check(faces["v4-0731"], case)


@needs_shared
@pytest.mark.parametrize("case", cases(SHARED / "v41/small.jsonl"))
@pytest.mark.parametrize("faces", [STRICT, DEFAULT], ids=["strict", "default"])
def test_v41(case, faces):
    check(faces["v4.1"], case)


@pytest.mark.parametrize("case", cases(HERE / "generated/encode.jsonl"))
def test_default_differs_only_where_documented(case):
    if case["id"] in FIXED:
        text = DEFAULT["v4"].render(case["messages"], **settings(case["args"]))
        assert FIXED[case["id"]] in text
        assert text != case.get("expected")
    elif case["id"] in REFUSED:
        with pytest.raises(EncodingError) as caught:
            DEFAULT["v4"].render(case["messages"], **settings(case["args"]))
        assert REFUSED[case["id"]] in str(caught.value)
    else:
        check(DEFAULT["v4"], case)


@needs_shared
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("faces", [STRICT, DEFAULT], ids=["strict", "default"])
def test_official_golden(number, faces):
    messages = official_input(number)
    expected = (SHARED / f"official/test_output_{number}.txt").read_text(encoding="utf-8")
    assert faces["v4"].render(messages, mode="chat" if number == 4 else "thinking") == expected


@needs_shared
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("faces", [STRICT, DEFAULT], ids=["strict", "default"])
def test_official_golden_v41(number, faces):
    expected = (SHARED / f"v41/test_output_{number}.txt").read_text(encoding="utf-8")
    assert faces["v4.1"].render(official_input(number), generation_prompt=False) == expected


def official_input(number):
    given = json.loads((SHARED / f"official/test_input_{number}.json").read_text(encoding="utf-8"))
    if isinstance(given, list):
        return given
    given["messages"][0]["tools"] = given["tools"]
    return given["messages"]


def check(encoding, case):
    if "expected" in case:
        text = encoding.render(case["messages"], **settings(case["args"]))
        assert text == case["expected"]
    else:
        with pytest.raises(HadalError):
            encoding.render(case["messages"], **settings(case["args"]))


def test_effort_texts():
    texts = json.loads((HERE / "effort-prefixes.json").read_text(encoding="utf-8"))
    effort = {name: STRICT[name].generation.effort_text for name in STRICT}
    assert effort["v4"]("max") == texts["original_max"]
    for name in ("low", "high", "max"):
        assert effort["v4-0731"](name) == texts[f"0731_{name}"]
    for name, budget in texts["v41_budgets_release"].items():
        assert effort["v4.1"](name) == texts["v41_template"].format(budget=budget)
    assert effort["v4.1"](7) == texts["v41_template"].format(budget=7)

"""What people see of a run: all of it, as text, whatever a model or a box has put into it."""

import io

import pytest
from rich.console import Console

from hadal.agent.terminal import Terminal, show_event
from hadal.plain_text import one_line, visible

HOSTILE = "\x1b]52;c;cm0gLXJmIC8=\x07\x1b[2J[bold]x[/nothing] \u202e\x9b1A\r"


def reply(**fields):
    message = {"reasoning": "", "content": "", "calls": []} | fields
    return {"kind": "reply", "message": message, "problems": []}


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "user", "text": HOSTILE},
        reply(reasoning=HOSTILE),
        reply(content=HOSTILE),
        reply(calls=[["1", HOSTILE, HOSTILE]]),
        reply() | {"problems": [HOSTILE]},
        {"kind": "result", "text": HOSTILE, "failed": False, "exit_code": 0, "seconds": 0.1},
        {"kind": "retry", "error": HOSTILE, "after_s": 1.0},
    ],
)
def test_nothing_steers_the_terminal(event):
    out = io.StringIO()
    show_event(Console(file=out, width=500), event)
    shown = out.getvalue()
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e")
    assert r"\x1b]52;c;cm0gLXJmIC8=\x07\x1b[2J[bold]x[/nothing] \u202e\x9b1A" in shown


def test_visible_text():
    assert visible("a\tb\nü 漢 😀\x00") == "a\tb\nü 漢 😀\\x00"
    assert one_line("a\nb", 10) == r"a\nb"
    assert one_line("x" * 300, 200) == "x" * 199 + "…"
    escaped = one_line("\x1b" * 60, 60)
    assert escaped.startswith(r"\x1b\x1b")
    assert len(escaped) == 60


def test_a_terminal_has_a_line_on_what_is_under_way():
    out = io.StringIO()
    with Terminal(Console(file=out, width=120, force_terminal=True)) as terminal:
        under_way = []
        for event in (
            {"kind": "prompt", "ids": [1] * 1200},
            {"kind": "tokens", "ids": [1, 2], "text": "first\nI look"},
            {"kind": "tokens", "ids": [3], "text": " at it"},
            reply(reasoning="I look at it", calls=[["1", "bash", "{}"]]),
            {"kind": "call", "call": "1", "name": "bash"},
            {"kind": "output", "call": "1", "text": "one\ntw"},
            {"kind": "output", "call": "1", "text": "o \x1b[2J\n"},
            {
                "kind": "result",
                "call": "1",
                "text": "two",
                "failed": False,
                "exit_code": 0,
                "seconds": 0.1,
            },
        ):
            terminal.show(event)
            under_way.append(str(terminal.status))
    assert under_way[0] == "reads 1,200 tokens"
    assert under_way[1:3] == [
        "writes, 2 tokens, 0 s: I look",
        "writes, 3 tokens, 0 s: I look at it",
    ]
    assert under_way[3] == under_way[7] == ""
    assert under_way[4:7] == ["runs bash: ", "runs bash: tw", r"runs bash: two \x1b[2J"]


def test_no_terminal_no_line():
    out = io.StringIO()
    with Terminal(Console(file=out)) as terminal:
        terminal.show({"kind": "prompt", "ids": [1]})
        terminal.show({"kind": "end", "reason": "done"})
    assert out.getvalue() == "ended: done\n"

"""What of the context goes to what."""

from hadal.agent import Limits, StopReason, read_events
from hadal.agent.atif import to_atif
from hadal.agent.budget import described, prompt_parts, reply_parts
from hadal.chat import UserMessage
from hadal.tools import tool
from tests.agent.conftest import answer, calls

END, DSML = 7, 9


def test_parts_of_a_reply():
    def parts(ids, *, reasons=True):
        return reply_parts(ids, reasons=reasons, think_end=END, dsml=DSML)

    assert parts([1, 2, END, 3]) == {"reasoning": 3, "answers": 1}
    assert parts([1, END, 3, DSML, 4, DSML]) == {"reasoning": 2, "answers": 1, "calls": 3}
    assert parts([1, 2]) == {"reasoning": 2}  # cut off
    assert parts([1, 2], reasons=False) == {"answers": 2}
    assert parts([DSML, 1, END], reasons=False) == {"calls": 3}
    assert parts([]) == {}


def test_parts_of_a_prompt():
    one = [UserMessage("x")]
    assert prompt_parts(10, one, 7) == {"instructions": 7, "user": 3}
    assert prompt_parts(10, one * 3, 7) == {"instructions": 7, "earlier": 3}
    assert prompt_parts(10, one, None) == {"user": 10}


def test_every_token_of_the_context_is_of_some_part(run):
    script = [calls({"a": 1, "b": 2}, {"a": 3, "b": 4}), answer("3 and 7"), answer("Yes.")]
    _, trajectory = run(script, ["Add.", "Sure?"])
    assert sum(trajectory.parts.values()) == len(trajectory.ids)
    assert set(trajectory.parts) == {
        "instructions",
        "user",
        "reasoning",
        "answers",
        "calls",
        "results",
    }
    told = run.encoding.encode([run_system(run)], mode="thinking", generation_prompt=False)
    assert trajectory.parts["instructions"] == len(told)
    steps = [s for s in to_atif(read_events(run.path), "s")["steps"] if "metrics" in s]
    for step in steps:
        metrics = step["metrics"]
        both = metrics["prompt_tokens"] + metrics["completion_tokens"]
        assert sum(metrics["extra"]["context"].values()) == both
    assert steps[-1]["metrics"]["extra"]["context"] == trajectory.parts


def run_system(run):
    from hadal.agent import SYSTEM_PROMPT
    from hadal.chat import SystemMessage
    from tests.agent.conftest import add

    return SystemMessage(SYSTEM_PROMPT, tools=(add.declaration,))


def test_without_earlier_reasoning_all_is_told_anew(run):
    script = [calls({"a": 1, "b": 2}), answer("3"), answer("Yes.")]
    _, trajectory = run(script, ["Add.", "Sure?"], keep_reasoning=False)
    assert sum(trajectory.parts.values()) == len(trajectory.ids)
    assert trajectory.parts["earlier"] > 0


def test_a_full_window_says_what_fills_it(run):
    @tool
    def more() -> str:
        """Say much."""
        return "word " * 400

    limits = Limits(window=4000)
    ending, _ = run([calls({}, name="more")] * 9, tools=[more], limits=limits)
    assert ending.reason is StopReason.CONTEXT_FULL
    assert "% of 4,000: instructions" in ending.text
    assert "results" in ending.text


def test_in_words():
    assert (
        described({"user": 1500, "results": 500}, 10_000)
        == "2,000 tokens, 20.0% of 10,000: user 1,500, results 500"
    )
    assert described({"user": 3}, None) == "3 tokens: user 3"

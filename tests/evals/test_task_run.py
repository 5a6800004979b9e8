"""Tasks done by an agent whose model is a script: solved, failed, void, and gone on with."""

import asyncio

import pytest

from hadal.agent import Outcome, StopReason, read_events
from hadal.backends.scripted_backend import ScriptedBackend
from hadal.evals import Score, interval, run_task, run_tasks, scores, well_formed
from hadal.evals.task_run import _count_calls
from hadal.tasks import Call, make_task
from tests.agent.conftest import answer, calls


def script(task):
    """Return what a model says that does as the solution says, where that does not look at results."""
    replies = []
    for step in task.solve():
        if isinstance(step, Call):
            replies.append(calls(dict(step.arguments), name=step.tool, thought=step.thought))
        else:
            replies.append(answer(step.text, step.thought))
    return replies


def run(task, replies, encoding, path):
    backend = ScriptedBackend(encoding.tokenizer, replies)
    return asyncio.run(run_task(task, backend, encoding, path))


def test_solved_and_not(node, encoding, tmp_path):
    task = make_task("count_lines", "test", 1)
    good = run(task, script(task), encoding, tmp_path / "good.jsonl")
    assert (good.outcome, good.score, good.turns, good.calls) == (Outcome.SCORED, 1, 2, 1)
    assert good.prompt_tokens > good.reply_tokens > 0
    idle = run(task, [answer("Done.")], encoding, tmp_path / "idle.jsonl")
    assert (idle.outcome, idle.score) == (Outcome.SCORED, 0)
    assert "is not there" in idle.detail
    mute = run(task, [["hm"]] * 3, encoding, tmp_path / "mute.jsonl")
    assert (mute.outcome, mute.score, mute.reason) == (Outcome.FAILED, 0, StopReason.MALFORMED)
    again = run(task, [], encoding, tmp_path / "good.jsonl")
    assert (again.score, again.turns) == (1, 2)
    found = scores([good, idle, mute])
    assert found == {(1, "count_lines"): Score(1, 3)}
    assert well_formed([good, idle, mute]) == (1, 4)


def test_a_reply_without_a_call_has_no_wrong_one():
    """An untrained network's replies end at the limit: they are bad, and no calls."""

    def reply(termination, problems, calls):
        message = {"content": "", "reasoning": "", "calls": calls}
        return {
            "kind": "reply",
            "message": message,
            "termination": termination,
            "problems": problems,
        }

    cut = reply("length", ["unclosed_thinking"], [])
    odd = reply("tool_calls", ["text_after_calls"], [["1", "nothing", "{}"]])
    assert _count_calls([cut, cut, cut]) == (0, 0)
    assert _count_calls([cut, odd]) == (1, 1)


def test_void_is_no_zero_and_goes_on(node, encoding, tmp_path):
    task = make_task("sort_lines", "test", 1)
    replies = script(task)
    first = run(task, replies[:1], encoding, tmp_path / "run.jsonl")
    assert (first.outcome, first.score) == (Outcome.VOID, None)
    assert list(scores([first]).values()) == [Score(0, 0, void=1)]
    second = run(task, replies[1:], encoding, tmp_path / "run.jsonl")
    assert (second.outcome, second.score, second.turns) == (Outcome.SCORED, 1, 2)
    kinds = [e["kind"] for e in read_events(tmp_path / "run.jsonl")]
    assert kinds.count("result") == 1


def test_many_at_once(node, encoding, tmp_path):
    tasks = [make_task("copy_file", "test", seed) for seed in range(6)]
    backend = ScriptedBackend(encoding.tokenizer, [answer("Done.")] * 6)
    told = []
    found = asyncio.run(
        run_tasks(tasks, backend, encoding, tmp_path, at_once=3, progress=told.append)
    )
    assert [r.task for r in found] == [t.name for t in tasks]
    assert len(told) == 6


@pytest.mark.parametrize(("solved", "count"), [(0, 10), (5, 10), (10, 10), (97, 100)])
def test_intervals(solved, count):
    low, high = interval(solved, count)
    assert 0 <= low <= solved / count <= high <= 1
    assert high - low < 0.6
    assert interval(0, 0) == (0.0, 1.0)
    assert Score(solved, count).interval == (low, high)
    assert str(Score(5, 10)) == "50.0% (23.7% to 76.3%)"
    assert str(Score(0, 0, void=2)) == "none"

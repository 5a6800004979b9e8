"""The export for Harbor: every step, its tokens, and nothing that its schema does not know."""

import json

import pytest

from hadal.agent import read_events
from hadal.agent.atif import ATIF_VERSION, to_atif
from hadal.encoding.tokens import EOS, THINK_END
from tests.agent.conftest import answer, calls

STEP = set(
    "step_id timestamp source model_name reasoning_effort message reasoning_content tool_calls observation metrics "
    "is_copied_context llm_call_count extra".split()
)
METRICS = set(
    "prompt_tokens completion_tokens cached_tokens cost_usd prompt_token_ids completion_token_ids logprobs extra".split()
)


def test_a_run(run):
    run([calls({"a": 1, "b": 2}, {"a": 3, "b": 4}), ["hm", THINK_END, EOS], answer("ok")])
    found = to_atif(read_events(run.path), "session", model_name="nano")
    assert json.loads(json.dumps(found)) == found
    assert (found["schema_version"], found["session_id"]) == (ATIF_VERSION, "session")
    assert found["agent"]["tool_definitions"][0]["function"]["name"] == "add"
    steps = found["steps"]
    assert [s["source"] for s in steps] == ["system", "user", "agent", "agent", "user", "agent"]
    assert [s["step_id"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert all(set(s) <= STEP for s in steps)
    agent = [s for s in steps if s["source"] == "agent"]
    assert all(set(s["metrics"]) <= METRICS for s in agent)
    call = agent[0]["tool_calls"][1]
    assert call["arguments"] == {"a": 3, "b": 4}
    results = agent[0]["observation"]["results"]
    assert {r["source_call_id"]: r["content"] for r in results} == {
        agent[0]["tool_calls"][0]["tool_call_id"]: "3", call["tool_call_id"]: "7",
    }  # fmt: skip
    assert [s["metrics"]["prompt_token_ids"] for s in agent] == run.backend.prompts
    for step in agent:
        metrics = step["metrics"]
        assert len(metrics["prompt_token_ids"]) == metrics["prompt_tokens"]
        text = run.encoding.decode(metrics["completion_token_ids"])
        assert text.startswith((step.get("reasoning_content") or "") + "</think>")
    assert steps[4]["extra"] == {"by": "harness"}
    assert found["extra"]["stop_reason"] == "done"
    assert found["final_metrics"]["total_prompt_tokens"] == sum(map(len, run.backend.prompts))


def test_log_probabilities(run):
    script = [calls({"a": 1, "b": 2}), answer("3")]
    run(script, sampling={"logprobs": 0})
    agent = [s["metrics"] for s in to_atif(read_events(run.path), "s")["steps"] if "metrics" in s]
    assert [m["logprobs"] for m in agent] == [[0.0] * m["completion_tokens"] for m in agent]
    assert (
        "logprobs"
        not in to_atif(read_events(run.path), "s", token_ids=False)["steps"][2]["metrics"]
    )
    run.path.unlink()
    run(script)
    assert "logprobs" not in to_atif(read_events(run.path), "s")["steps"][2]["metrics"]


def test_a_run_that_goes_on(run):
    run([calls({"a": 1, "b": 2}), answer("3")])
    events = read_events(run.path)
    for count in range(len(events)):
        assert to_atif(events[:count], "s")["steps"] is not None


def test_what_runs_says_so_far(run):
    """And from the start again, where the agent was killed meanwhile and asks for it once more."""
    run([calls({"a": 1, "b": 2}), answer("3")])
    events = read_events(run.path)
    at = next(i for i, e in enumerate(events) if e["kind"] == "call")
    begun = events[at]
    said = [{**begun, "kind": "output", "text": text} for text in ("one\n", "two\n")]
    assert to_atif([*events[: at + 1], *said], "s")["extra"]["running"] == {
        begun["call"]: "one\ntwo\n"
    }
    again = to_atif([*events[: at + 1], *said, begun, said[0]], "s")
    assert again["extra"]["running"] == {begun["call"]: "one\n"}
    assert "running" not in to_atif([*events[: at + 1], *said, *events[at + 1 :]], "s")["extra"]


@pytest.mark.parametrize("value", ["1e999", r'"\ud800"', "9" * 5000, "[" * 3000 + "]" * 3000])
def test_what_json_has_no_place_for_is_kept_as_text(run, value):
    run([calls({"a": 1, "b": 2}), answer("3")])
    events = read_events(run.path)
    reply = next(e for e in events if e["kind"] == "reply")
    reply["message"]["calls"][0][2] = text = f'{{"a": {value}}}'
    found = to_atif(events, "s")
    agent = next(s for s in found["steps"] if s["source"] == "agent")
    assert agent["tool_calls"][0]["arguments"] == {"text": text}
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


def test_a_run_that_was_void_and_goes_on(run):
    run([calls({"a": 1, "b": 2}), answer("3")])
    events = read_events(run.path)
    later = [{**events[-1], "kind": kind, **more} for kind, more in (("score", {"score": None, "detail": "x"}), ("again", {}))]  # fmt: skip
    assert to_atif([*events, later[0]], "s")["extra"]["score"] is None
    extra = to_atif([*events, *later], "s")["extra"]
    assert not {"stop_reason", "outcome", "score", "score_detail"} & set(extra)

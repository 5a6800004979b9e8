"""A run that dies at any event goes on as if it had not, and a call that has its result is not made again."""

import pytest

from hadal.agent import Journal, StopReason, read_events
from hadal.encoding.tokens import EOS, THINK_END
from hadal.errors import ConfigError, StorageError
from hadal.tools import tool
from tests.agent.conftest import answer, calls

SCRIPT = [
    calls({"a": 1, "b": 2}, {"a": 3, "b": 4}),
    ["hm", THINK_END, EOS],
    calls({"a": 5, "b": 6}),
    answer("first"),
    answer("second"),
]
MESSAGES = ["Add.", "Again."]


class DiedError(BaseException):
    """What a kill is to the process."""


def shown(trajectory):
    return (
        trajectory.messages, trajectory.ids, trajectory.said, trajectory.turns, trajectory.users, trajectory.history
    )  # fmt: skip


def script_left(events):
    """Return what a model would go on with: the rest of the reply under way, and those after it."""
    done = sum(e["kind"] == "reply" for e in events)
    return SCRIPT[done:]


def test_death_at_every_event(run):
    made = []

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        made.append((a, b))
        return a + b

    ending, whole = run(SCRIPT, MESSAGES, tools=[add])
    assert ending.reason is StopReason.DONE
    assert made == [(1, 2), (3, 4), (5, 6)]
    total = len(run.events)
    assert total > 60
    for stop in range(1, total):
        run.path.unlink()
        made.clear()
        seen = 0

        def die(event, stop=stop):
            nonlocal seen
            seen += 1
            if seen >= stop:
                raise DiedError

        with pytest.raises(DiedError):
            run(SCRIPT, MESSAGES, tools=[add], watch=die)
        lines = run.path.read_bytes().splitlines(keepends=True)
        run.path.write_bytes(b"".join(lines[:stop]))  # calls side by side go on for a moment
        events = read_events(run.path)
        again = resumed(run, events, add)
        assert shown(again) == shown(whole), stop
        results = [e["call"] for e in read_events(run.path) if e["kind"] == "result"]
        assert len(results) == len(set(results)) == 3
        assert (
            len(made) <= 4
        )  # one whose result had not been written may be made again, under the same id


def resumed(run, events, add):
    """Go on; a model that continues a reply says its remaining tokens."""
    left = script_left(events)
    under_way: list[int] = []
    for event in events:
        if event["kind"] == "prompt":
            under_way = []
        elif event["kind"] == "tokens":
            under_way += event["ids"]
        elif event["kind"] == "reply":
            under_way = []
    if under_way:
        whole = run.encoding.tokenizer.encode_items(left[0])
        assert whole[: len(under_way)] == under_way
        rest = whole[len(under_way) :]
        left = [rest, *left[1:]] if rest else left[1:]
    ending, trajectory = run(left, MESSAGES, tools=[add])
    assert ending.reason is StopReason.DONE
    return trajectory


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append("start", version=1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"user","te')
    assert len(read_events(path)) == 1
    with Journal(path) as journal:
        assert [e["kind"] for e in journal.events] == ["start"]
    assert path.read_bytes() == whole


def test_damage_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"kind":"start"}\nnonsense\n{"kind":"end"}\n')
    for look in (Journal, read_events):
        with pytest.raises(StorageError, match="damaged at line 2"):
            look(path)


def test_two_at_once(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path), pytest.raises(ConfigError, match="another process runs"):
        Journal(path)
    with Journal(path) as journal:
        assert journal.events == []


def test_a_run_that_has_ended_stays_ended(run):
    first, _ = run([answer("1")])
    second, _ = run([], ["Add."])
    assert first == second
    assert run.events == []


def test_a_void_run_can_go_on(run):
    first, _ = run([calls({"a": 1, "b": 2})])  # then the script is empty
    assert first.reason is StopReason.MODEL_FAILED
    second, trajectory = run([answer("3")], ["Add."])
    assert (second.reason, second.text) == (StopReason.DONE, "3")
    assert trajectory.turns == 2


def test_a_run_goes_on_as_it_was_begun(run):
    run([calls({"a": 1, "b": 2})])

    @tool
    def other(a: int) -> int:
        """Do something else."""
        return a

    for settings, said in (
        ({"tools": [other]}, "tools"),
        ({"mode": "chat"}, "mode"),
        ({"system": "x"}, "system"),
    ):
        with pytest.raises(ConfigError, match=f"begun with another {said}"):
            run([answer("3")], ["Add."], **settings)
    ending, _ = run([answer("3")], ["Add."])
    assert ending.reason is StopReason.DONE

"""Policies without a network, through the whole path: prompt, reply, box, check."""

import asyncio
import json

import pytest

from hadal.agent import AgentConfig
from hadal.chat import AssistantMessage, ToolCall, ToolMessage, UserMessage
from hadal.errors import InputError
from hadal.evals import run_tasks
from hadal.evals.baselines import Heuristic, NearestDemonstration, RandomCommand
from hadal.evals.policy_backend import PolicyBackend, Seen
from hadal.tasks import make_task


def demonstration(asked, command):
    call = ToolCall("bash", json.dumps({"command": command}), id="1")
    first = AssistantMessage("", reasoning_content="I do it.", tool_calls=(call,))
    last = AssistantMessage("Done.", reasoning_content="That is done.")
    return (UserMessage(asked), first, ToolMessage("", "1"), last)


SHOWN = [
    demonstration(f"Write the number of lines of a{n}.txt to b{n}.txt", f"wc -l < a{n}.txt > b{n}.txt")
    for n in range(20)
] + [demonstration(f"Delete the file c{n}.log.", f"rm c{n}.log") for n in range(20)]  # fmt: skip


def command(reply):
    return reply.tool_calls[0].parsed()["command"]


def test_the_nearest_demonstration_with_the_names_of_now():
    policy = NearestDemonstration(SHOWN)
    asked = "Write the number of lines of moon.md to sea.txt"
    assert command(policy(Seen(asked, ()))) == "wc -l < moon.md > sea.txt"
    assert policy(Seen(asked, ("(no output)",))).content == "Done."
    assert command(policy(Seen("Delete the file née.log.", ()))) == "rm née.log"
    with pytest.raises(InputError):
        NearestDemonstration([])


def test_names_in_texts_to_be_remembered_are_names():
    """A long text has every word that names are made of; what is said about it is no language."""
    notes = " ".join(["moon.md", "sea", "tide", "reef"] * 20)
    shown = [*SHOWN, *(demonstration(f"Remember this: {n} {notes}", "true") for n in range(20))]
    asked = "Write the number of lines of tide.md to reef.txt"
    folder = [demonstration(f"List the folder sea{n}.", f"ls sea{n}") for n in range(20)]
    assert command(NearestDemonstration(shown)(Seen(asked, ()))) == "wc -l < tide.md > reef.txt"
    assert (
        command(NearestDemonstration([*shown, *folder])(Seen("List the folder tide.", ())))
        == "ls tide"
    )


def test_a_random_command_is_one_that_was_right_somewhere():
    policy = RandomCommand(SHOWN, seed=1)
    found = {
        command(policy(Seen("Write the number of lines of x.md to y.txt", ()))) for _ in range(40)
    }
    assert found == {"wc -l < x.md > y.txt", "rm x.md"}


def run(policy, encoding, tasks, folder):
    backend = PolicyBackend(policy, encoding)
    return asyncio.run(run_tasks(tasks, backend, encoding, folder, AgentConfig()))


def test_rules_by_hand_solve_what_they_were_written_for(node, encoding, tmp_path):
    tasks = [make_task(f, "test", s) for f in ("remove_file", "fix_name") for s in range(4)]
    results = run(Heuristic(), encoding, tasks, tmp_path)
    assert all(r.solved == (r.family == "remove_file") for r in results)
    assert all(r.malformed_calls == 0 and r.bad_replies == 0 for r in results)
    assert sum(r.calls for r in results) >= 4


def test_calls_that_fit_no_tool_count_as_malformed(node, encoding, tmp_path):
    def policy(seen):
        if seen.results:
            return AssistantMessage("Done.", reasoning_content="x")
        calls = (ToolCall("nothing", "{}", id="1"), ToolCall("bash", '{"command": 3}', id="2"),
                 ToolCall("bash", '{"command": "true"}', id="3"))  # fmt: skip
        return AssistantMessage("", reasoning_content="x", tool_calls=calls)

    [result] = run(policy, encoding, [make_task("remove_file", "test", 1)], tmp_path)
    assert (result.calls, result.malformed_calls, result.solved) == (3, 2, False)

"""Agents, engine, node and all of them killed at random, while a trained network works: nothing is lost,
nothing is done twice, and everything ends as without it.

HADAL_TEST_AGENT_KILLS says how often; 12 without it.
"""

import os
import random
import time

import pytest

from hadal.agent import Trajectory, read_events

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("HADAL_TEST_AGENT_KILLS", "12"))
TASKS = [f"{family}/test/{40_000 + n}" for n, family in enumerate(
    ("append_line", "set_key", "wrong_place", "fix_function", "missing_flag", "carry_choice", "append_line",
     "rename_to_content")
)]  # fmt: skip


def run_to_the_end(programs, into, disturb):
    """Let two agents do the tasks; `disturb` is called now and then."""
    shares = [TASKS[0::2], TASKS[1::2]]
    for number, share in enumerate(shares):
        programs.start_agent(number, share, into)
    over = set()
    deadline = time.monotonic() + 540
    while len(over) < len(shares):
        assert time.monotonic() < deadline, "it does not come to an end"
        disturb()
        for number, share in enumerate(shares):
            code = programs.agents[number].poll()
            if code == 0:
                over.add(number)
            elif code is not None:  # killed, or without an outcome: the same command goes on
                programs.start_agent(number, share, into)
        time.sleep(0.05)
    return {task: told(into / f"{task.replace('/', '-')}.jsonl") for task in TASKS}


def told(path):
    """Return what a journal says of the work: messages, ids, results, the score; and which step of the box each
    call was: one that ran twice would move those after it. Before the first come the task's files, which are put
    there again where that was interrupted.
    """
    events = read_events(path)
    found = [e for e in events if e["kind"] == "result"]
    first = next((e["step"] for e in found if e["step"] is not None), 0)
    results = [(e["call"], e["text"], e["step"] and e["step"] - first) for e in found]
    [score] = {e["score"] for e in events if e["kind"] == "score" and e["score"] is not None}
    messages = [(m.role, m.content) for m in Trajectory.of(events).messages]
    return messages, results, Trajectory.of(events).ids, score


class Killer:
    """Kills something every now and then, and starts the server again."""

    def __init__(self, programs, seed):
        self.done = dict.fromkeys(("agent", "engine", "node", "all"), 0)
        self._programs = programs
        self._random = random.Random(seed)
        self._next = time.monotonic() + 1

    def __call__(self):
        if time.monotonic() < self._next or sum(self.done.values()) >= KILLS:
            return
        kind = self._random.choice(list(self.done))
        self._kill(kind)
        self.done[kind] += 1
        if self._programs.server.poll() is not None:
            self._programs.start_server()
        self._next = time.monotonic() + self._random.uniform(0.1, 3.0)

    def _kill(self, kind):
        agents = list(self._programs.agents.values())
        if kind in ("agent", "all"):
            for agent in agents if kind == "all" else [self._random.choice(agents)]:
                agent.kill()
                agent.wait()
        if kind in ("node", "all"):
            self._programs.kill_node()
        if kind in ("engine", "all"):
            self._programs.server.kill()
            self._programs.server.wait()


@pytest.mark.timeout(7200)
def test_everything_ends_as_without_the_kills(programs, tmp_path):
    programs.start_server()
    undisturbed = run_to_the_end(programs, tmp_path / "undisturbed", lambda: None)
    assert sum(score for *_, score in undisturbed.values()) > len(TASKS) // 2
    killer, number = Killer(programs, seed=KILLS), 0
    while sum(killer.done.values()) < KILLS:
        number += 1
        found = run_to_the_end(programs, tmp_path / f"disturbed-{number}", killer)
        for task in TASKS:
            assert found[task] == undisturbed[task], task
    print(f"{KILLS} kills: {killer.done}, in {number} runs of {len(TASKS)} tasks")  # noqa: T201

"""`hadal demo`: what it says has happened."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hadal.agent import read_events
from tests.demo.conftest import HADAL

pytestmark = pytest.mark.slow


def test_demo(node, tmp_path):
    done = subprocess.run(
        [*HADAL, "demo", "--tasks", "6", "--workers", "2", "--into", tmp_path, "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["results"]) == 6
    assert sum(r["score"] for r in found["results"]) >= 3
    assert found["kept"], done.stderr
    assert "was killed (kill -9) in the middle of" in done.stderr.replace("\n", " ")
    killed = next(r for r in found["results"] if r["task"] == found["killed"])
    events = read_events(tmp_path / f"{killed['task'].replace('/', '-')}.jsonl")
    assert [e["kind"] for e in events].count("start") == 1
    assert sum(r["cached_tokens"] for r in found["results"]) > 0


def children(pid):
    """Ids of the processes that a process has started and that live."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)  # fmt: skip
    return [int(line) for line in listed.stdout.split()]


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_ended(node, tmp_path, kind):
    command = [*HADAL, "demo", "--tasks", "4", "--into", tmp_path]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.jsonl")):
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = children(demo.pid)
    assert len(started) >= 3  # the server, and agents
    os.kill(demo.pid, kind)
    demo.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(lives(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_usage(tmp_path):
    (tmp_path / "x").write_text("")
    for arguments, said in (
        (("--tasks", "0"), "at least one task"),
        (("--into", tmp_path), "is not empty"),
        (("--model", "/nothing", "--into", tmp_path / "new"), "the server ended with"),
    ):
        done = subprocess.run([*HADAL, "demo", *arguments], capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode in (2, 3)
        assert said in done.stderr.replace("\n", " ")

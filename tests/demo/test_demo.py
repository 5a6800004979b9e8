"""`hadal demo`: what it says has happened."""

import json
import os
import signal
import subprocess
import time

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


def test_nothing_is_left_when_it_is_ended(node, tmp_path):
    def processes():
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        return [line for line in listed.stdout.splitlines() if "hadal serve" in line or str(tmp_path) in line]  # fmt: skip

    command = [*HADAL, "demo", "--tasks", "4", "--into", tmp_path]
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.jsonl")):
            assert demo.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(demo.pid, kind)
        demo.wait(timeout=20)
        deadline = time.monotonic() + 10
        while [line for line in processes() if "ps -eo" not in line]:
            assert time.monotonic() < deadline, processes()
            time.sleep(0.1)
        for path in tmp_path.iterdir():
            path.unlink()


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

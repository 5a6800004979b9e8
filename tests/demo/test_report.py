"""What a demonstration says at its end, also where nothing of it worked."""

import shlex
from pathlib import Path

import pytest
from rich.console import Console

from hadal.agent import Outcome, StopReason
from hadal.cli import demo
from hadal.demo import DemoReport
from hadal.demo.processes import Worker
from hadal.errors import HadalError
from hadal.evals import TaskResult
from hadal.tasks import make_task

NOTHING = {
    "turns": 0, "calls": 0, "malformed_calls": 0, "bad_replies": 0, "prompt_tokens": 0, "cached_tokens": 0,
    "reply_tokens": 0, "seconds": 0.1,
}  # fmt: skip


def void(seed):
    return TaskResult(
        task=f"copy_file/test/{seed}", family="copy_file", level=1, outcome=Outcome.VOID, score=None,
        reason=StopReason.SANDBOX_FAILED, detail="no guest program \x1b[31m", **NOTHING,
    )  # fmt: skip


def test_where_no_box_can_be_made(tmp_path):
    console = Console(record=True, width=200)
    folder = tmp_path / "my runs"
    folder.mkdir()
    demo._show(console, DemoReport((void(1), void(2)), None, False, 1.0, 1.0, folder))
    said = console.export_text()
    assert "solved 0 of 2" in said
    assert said.count("no guest program") == 1
    assert "\x1b[31m" not in said
    assert "hadal doctor" in said


def test_what_it_says_can_be_done_next_can_be_pasted(tmp_path):
    console = Console(record=True, width=20)
    folder = tmp_path / "my runs"
    folder.mkdir()
    demo._show_next(console, folder)
    look, task, serve = (
        shlex.split(line) for line in console.export_text().splitlines() if line.startswith("  ")
    )
    assert look[1:] == ["view", str(folder)]
    assert serve[1:] == ["serve", "nano"]
    mounted = task[task.index("--mount") + 1].removesuffix(":/data:rw")
    assert (Path(mounted) / "moon.txt").read_text().count("\n") == 3


@pytest.mark.parametrize(("on_path", "said"), [(True, "hadal"), (False, "bin/hadal")])
def test_how_the_program_is_called(tmp_path, monkeypatch, on_path, said):
    program = tmp_path / "bin/hadal"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(demo.sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", str(program.parent) if on_path else "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert demo._program() == said


def test_a_worker_that_ends_without_an_outcome_is_told_with_what_it_said(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"error: the disk is full\n")
    task = make_task("copy_file", "test", 1)
    worker = Worker(1, [task], (), log)
    worker.check(over={task.name})
    with pytest.raises(
        HadalError, match=r"without an outcome of copy_file/test/1: error: the disk"
    ):
        worker.check(over=set())

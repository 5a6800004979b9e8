"""`hadal run` with a random network: it ends with a reason, and everything is in its journal."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hadal.agent import Journal, read_events
from hadal.checkpoint import make_random
from hadal.config import ModelConfig
from tests.tools.test_mcp import SERVER


@pytest.fixture(scope="module")
def checkpoint(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    config = dataclasses.replace(ModelConfig.nano(), vocab_size=320)
    make_random(config.quantized("instruct"), folder, seed=1)
    shutil.copy(tokenizer_path, folder / "tokenizer.json")
    return folder


def hadal(*arguments):
    program = Path(sys.executable).with_name("hadal")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def start_hadal(*arguments):
    program = Path(sys.executable).with_name("hadal")
    return subprocess.Popen(
        [program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_a_random_network_ends_with_a_reason(node, checkpoint, tmp_path):
    model = ("--model", checkpoint, "--generation", "v4")
    done = hadal(
        "run", "Say hello.", *model, "--runs", tmp_path, "--window", 1500, "--seed", 1, "--json"
    )
    assert done.returncode == 1, done.stderr
    first, *events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["kind"] == "end"
    assert events[-1]["reason"] in (
        "context_full",
        "endless_reasoning",
        "malformed",
        "cut_off",
        "empty",
    )
    [journal] = tmp_path.glob("*.jsonl")
    assert [e for e in read_events(journal) if e["kind"] not in ("task", "making_box")] == events
    assert first == {"kind": "run", "id": journal.stem, "journal": str(journal)}
    again = hadal("run", "--resume", journal.stem, "--runs", tmp_path, "--json")
    assert again.returncode == 1
    assert json.loads(again.stdout) == events[-1]


@pytest.fixture
def killed(node, checkpoint, tmp_path):
    """A command whose run was killed as soon as it had a box, and that run's journal."""
    model = ("--model", checkpoint, "--generation", "v4", "--window", 1500, "--seed", 1)
    command = ("run", "Say hello.", *model, "--runs", tmp_path, "--env", "TOKEN=secret")
    with start_hadal(*command, "--json") as running:
        assert json.loads(running.stdout.readline())["kind"] == "run"
        assert json.loads(running.stdout.readline())["kind"] == "box"
        running.kill()
    [journal] = tmp_path.glob("*.jsonl")
    assert b"secret" not in journal.read_bytes()
    return command, journal


def test_a_reader_that_leaves_is_no_answer(node, checkpoint, tmp_path):
    model = ("--model", checkpoint, "--generation", "v4", "--window", 1500)
    with start_hadal("run", "Say hello.", *model, "--runs", tmp_path, "--json") as running:
        running.stdout.close()
        assert running.wait(timeout=60) == 3


def ends(journal):
    return [e["reason"] for e in read_events(journal) if e["kind"] == "end"]


def test_the_same_command_goes_on_with_a_run_that_was_killed(killed, tmp_path):
    command, journal = killed
    assert ends(journal) == []
    other = hadal(*command[:1], "Say nothing.", *command[2:], "--max-turns", 1)
    assert f"run {journal.stem}" not in other.stdout
    again = hadal(*command)
    assert f"run {journal.stem} " in again.stdout
    assert "it was not finished; --new begins another" in again.stdout
    assert len(ends(journal)) == 1
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert f"run {journal.stem} " not in hadal(*command).stdout, "it is finished now"


def test_a_run_goes_on_as_it_was_begun(killed, checkpoint, tmp_path):
    """With its id alone it has the model and the limits that it had; other ones are refused."""
    _, journal = killed
    resume = ("run", "--resume", journal.stem, "--runs", tmp_path)
    for options, named in (
        (("--model", "http://127.0.0.1:9"), "model"),
        (("--window", 1501), "window"),
        (("--mode", "chat", "--image", "other"), "image, another mode"),
    ):
        other = hadal(*resume, *options)
        assert (other.returncode, f"another {named}" in other.stderr.replace("\n", " ")) == (2, True), other.stderr  # fmt: skip
    again = hadal(*resume)
    assert again.returncode == 1, again.stderr
    [start] = [e for e in read_events(journal) if e["kind"] == "start"]
    assert (start["window"], start["sampling"]["seed"]) == (1500, 1)
    exported = json.loads(hadal("runs", "export", journal.stem, "--runs", tmp_path).stdout)
    assert exported["agent"]["model_name"] == str(checkpoint)


def test_a_run_does_not_go_on_with_other_weights(killed, tmp_path):
    _, journal = killed
    [begun] = [e for e in read_events(journal) if e["kind"] == "task"]
    lines = journal.read_bytes().replace(begun["identity"].encode(), b"0" * 64)
    journal.write_bytes(lines)
    resume = hadal("run", "--resume", journal.stem, "--runs", tmp_path)
    assert (resume.returncode, "are not those that the run was begun with" in resume.stderr) == (2, True)  # fmt: skip


def test_another_run_of_the_same_command(killed, tmp_path):
    command, journal = killed
    assert f"run {journal.stem} " not in hadal(*command, "--new").stdout
    with Journal(journal):  # it is run meanwhile
        assert f"run {journal.stem} " not in hadal(*command).stdout
    assert ends(journal) == []
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    both = hadal("run", "--resume", journal.stem, "--new", "--runs", tmp_path)
    assert (both.returncode, "--new" in both.stderr) == (2, True)


def test_a_run_whose_box_is_gone_is_left_for_another(killed, tmp_path):
    command, journal = killed
    [box] = [e["id"] for e in read_events(journal) if e["kind"] == "box"]
    hadal("box", "rm", box)
    again = hadal(*command)
    assert "it cannot go on: " in again.stdout
    assert read_events(journal)[-1]["kind"] == "abandoned"
    [other] = set(tmp_path.glob("*.jsonl")) - {journal}
    assert len(ends(other)) == 1
    assert journal.stem not in hadal(*command).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected a task or --resume ID"),
        (("x", "--resume", "y"), "expected a task or --resume ID"),
        (("--resume", "nothing"), "there is no run nothing"),
        (("x", "--effort", "banana"), "effort"),
        (("x", "--upstream-model", "v4"), "are for a model at a URL"),
        (("x", "--memory", "1"), "--memory: expected at least 1MiB"),
    ],
)
def test_usage(checkpoint, tmp_path, arguments, said):
    model = ("--model", checkpoint, "--generation", "v4")
    done = hadal("run", *arguments, *model, "--runs", tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


def test_tools_of_an_mcp_server(node, checkpoint, tmp_path):
    server = tmp_path / "server.py"
    server.write_text(SERVER)
    model = ("--model", checkpoint, "--generation", "v4", "--window", 2500, "--seed", 1, "--json")
    tools = ("--python", "--mcp", f"n={sys.executable} {server}")
    done = hadal("run", "Say hello.", *model, *tools, "--runs", tmp_path / "runs")
    start = next(e for e in map(json.loads, done.stdout.splitlines()) if e["kind"] == "start")
    names = [t["name"] for t in start["tools"]]
    assert names[:4] == ["bash", "str_replace_editor", "python", "n_add"]
    assert all(name.startswith("n_") for name in names[4:])
    broken = hadal("run", "Say hello.", *model, "--mcp", "n=/nothing", "--runs", tmp_path / "other")
    assert (broken.returncode, "cannot be used" in broken.stderr) == (2, True)


def test_runs(node, checkpoint, tmp_path):
    model = ("--model", checkpoint, "--generation", "v4")
    done = hadal("run", "Say hello.", *model, "--runs", tmp_path, "--window", 1500, "--seed", 1)
    assert "ended: context_full: " in done.stdout
    assert "of 1,500: instructions" in done.stdout.replace("\n", " ")
    where = ("--runs", tmp_path)
    [row] = [json.loads(line) for line in hadal("runs", "ls", *where, "--json").stdout.splitlines()]
    assert row["task"] == "Say hello."
    assert row["state"] in hadal("runs", "ls", *where).stdout
    assert "user: Say hello." in hadal("runs", "show", row["id"], *where).stdout
    events = hadal("runs", "show", row["id"], *where, "--json").stdout.splitlines()
    assert [json.loads(line) for line in events] == read_events(tmp_path / f"{row['id']}.jsonl")
    exported = json.loads(hadal("runs", "export", row["id"], *where).stdout)
    for metrics in (step["metrics"] for step in exported["steps"] if "metrics" in step):
        assert len(metrics["logprobs"]) == metrics["completion_tokens"]
        assert all(value < 0 for value in metrics["logprobs"])
    assert exported["extra"]["window"] == 1500
    assert exported["schema_version"] == "ATIF-v1.8"
    assert exported["extra"]["stop_reason"] == row["state"]
    missing = hadal("runs", "show", "nothing", *where)
    assert (missing.returncode, "there is no run nothing" in missing.stderr) == (2, True)

"""`hadal eval`: shares, folders that are gone on with, and wrong use."""

import json
import shutil

import pytest

from hadal.errors import ConfigError, StorageError
from hadal.evals import keep_settings
from tests.evals.test_cli_run import checkpoint, hadal

__all__ = ["checkpoint"]  # a fixture


def test_a_random_network_solves_nothing(node, checkpoint, tmp_path):
    asked = ("eval", "--model", checkpoint, "--generation", "v4", "--into", tmp_path / "runs",
             "--window", 1500, "--task", "remove_file/test/1", "--task", "count_words/test/2")  # fmt: skip
    done = hadal(*asked, "--json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["task"] for r in results} == {"remove_file/test/1", "count_words/test/2"}
    assert [(r["score"], r["outcome"]) for r in results] == [(0, "failed")] * 2
    again = hadal(*asked)  # from the journals
    assert "0 of 1" in again.stdout
    assert "count_words (not trained on)" in again.stdout
    other = hadal(*asked, "--max-turns", 3)
    assert (other.returncode, "begun with another turns" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--family", "nothing"), "no family of tasks 'nothing'"),
        (("--family", "count_words", "--split", "train"), "no family of tasks 'count_words'"),
        (("--task", "count_words"), "expected a task as FAMILY/SPLIT/SEED"),
        (("--at-once", 0), "expected a positive number"),
        (("--model", "http://localhost:1"), "needs --tokenizer"),
    ],
)
def test_usage(tmp_path, arguments, said):
    done = hadal("eval", "--into", tmp_path, *arguments)
    assert (done.returncode, said in done.stderr.replace("\n", " ")) == (2, True), done.stderr


def test_results_of_another_network_are_not_taken_for_its_own(node, checkpoint, tmp_path):
    """A folder of results is of the weights that made them, whatever their folder is called."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    asked = ("eval", "--model", model, "--generation", "v4", "--task", "remove_file/test/1",
             "--into", tmp_path / "runs", "--window", 1500)  # fmt: skip
    assert hadal(*asked).returncode == 0
    weights = next(model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = hadal(*asked)
    assert (other.returncode, "begun with another model" in other.stderr) == (2, True)


def test_a_folder_keeps_its_settings(tmp_path):
    keep_settings(tmp_path / "new", {"a": 1})
    keep_settings(tmp_path / "new", {"a": 1})
    with pytest.raises(ConfigError, match="another a"):
        keep_settings(tmp_path / "new", {"a": 2})
    (tmp_path / "new/settings.json").write_text("{")
    with pytest.raises(StorageError, match=r"settings\.json"):
        keep_settings(tmp_path / "new", {"a": 1})

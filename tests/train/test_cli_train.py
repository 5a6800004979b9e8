"""`hadal train`: a run from a file of demonstrations to a checkpoint that answers, and what is wrong on the way."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from hadal.checkpoint import load
from hadal.cli import train as cli_train
from hadal.errors import ConfigError, InputError, StorageError
from hadal.nano import nano_checkpoint
from hadal.train.metrics import plot, read_metrics, sparkline
from hadal.train.tokenizer import train_tokenizer, vocabulary_size


def hadal(*arguments):
    program = Path(sys.executable).with_name("hadal")
    return subprocess.run(
        [program, "train", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def made(tmp_path):
    """Demonstrations, a tokenizer, and sizes of a network that trains in seconds."""
    messages = [{"user": "Say it."}, {"thought": "I say it.", "text": "it", "calls": []}]
    with gzip.open(tmp_path / "shown.jsonl.gz", "wt") as file:
        for seed in range(20):
            file.write(json.dumps({"family": "f", "seed": seed, "messages": messages}) + "\n")
    train_tokenizer(["Say it. I say it."] * 3, 320, tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.slow
def test_from_demonstrations_to_a_checkpoint(made):
    asked = (
        "run", made / "shown.jsonl.gz", "--tokenizer", made / "tokenizer.json", "--into", made / "run",
        "--steps", 2, "--workers", 1, "--tokens", 4096,
    )  # fmt: skip
    begun = hadal(*asked, "--json")
    assert begun.returncode == 0, begun.stderr
    assert [json.loads(line)["step"] for line in begun.stdout.splitlines()] == [1, 2]
    assert "loss" in begun.stderr
    again = hadal(*asked)
    assert again.returncode == 0
    other = hadal(*asked, "--seed", 2)
    assert (other.returncode, "begun with other settings: seed: 1, now 2" in other.stderr) == (2, True)  # fmt: skip
    said = hadal("show", made / "run", "--plot", made / "losses.svg")
    assert said.stdout.startswith("2 steps, ")
    assert (made / "losses.svg").read_text().count("next token")
    assert json.loads(hadal("show", made / "run", "--json").stdout)["steps"] == 2
    assert hadal("export", made / "run", made / "small").returncode == 0
    assert load(made / "small").config.vocab_size == vocabulary_size(made / "tokenizer.json")
    assert hadal("export", made / "run", made / "small").returncode == 3


def test_what_is_wrong_is_said(made):
    shown, tokenizer = made / "shown.jsonl.gz", made / "tokenizer.json"
    for arguments, code, text in (
        (("run", shown, "--tokenizer", made / "none.json", "--into", made / "a"), 2, "cannot read the tokenizer"),
        (("run", made / "none", "--tokenizer", tokenizer, "--into", made / "b"), 3, "cannot read demonstrations"),
        (("run", shown, "--tokenizer", tokenizer, "--into", made / "c", "--tokens", 100), 2, "samples have 50 to 100"),
        (("run", shown, "--tokenizer", tokenizer, "--into", made / "d", "--device", "cuda", "--workers", 64), 2, "64 workers need a GPU each"),
        (("show", made / "none"), 3, "no training run in"),
        (("export", made / "none", made / "out"), 2, "cannot read"),
    ):  # fmt: skip
        said = hadal(*arguments)
        assert (said.returncode, text in said.stderr.replace("\n", " ")) == (code, True), said.stderr  # fmt: skip
        assert "Traceback" not in said.stderr


def test_a_seed_is_of_weights_and_of_samples(made, monkeypatch):
    """Another seed is another order of the same tasks; longer ones are left out where that is asked for."""
    asked = []
    monkeypatch.setattr(cli_train, "follow", lambda config, data, _: asked.append((config, data())))
    for seed in (1, 2):
        options = cli_train.TrainOptions(seed=seed, longest=2000, peak_lr=1e-4)
        cli_train.run(
            made / "shown.jsonl.gz", tokenizer=made / "tokenizer.json", into=made / f"{seed}", options=options,
        )  # fmt: skip
    (first, one), (second, other) = asked
    assert (first.seed, second.seed) == (1, 2)
    assert one.digest != other.digest
    assert first.final_lr == pytest.approx(5e-6)
    options = cli_train.TrainOptions(longest=10)
    with pytest.raises(InputError, match="no task to train on"):
        cli_train.run(
            made / "shown.jsonl.gz", tokenizer=made / "tokenizer.json", into=made / "3", options=options,
        )  # fmt: skip


def test_other_programs_read_the_tokenizer(made):
    """What they decode is the text, for that of nano too."""
    for path in (made / "tokenizer.json", nano_checkpoint() / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(path))
        for text in ("Say it. I say it.", "größer:\n  4,096 <ü>"):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_line_of_losses():
    assert sparkline([], 10) == ""
    assert sparkline([100.0, 10.0, 1.0], 3) == "█▅▁"
    assert len(sparkline(list(range(1, 1000)), 60)) == 60
    assert sparkline([1.0, 1.0], 60) == "▁▁"


def test_metrics_that_are_half_written(tmp_path):
    with pytest.raises(StorageError, match="no training run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}]
    with pytest.raises(ConfigError, match="cannot write the plot"):
        plot([], tmp_path / "losses.nothing")

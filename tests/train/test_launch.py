"""A run of two processes: it takes the steps of one with both batches, and goes on after a death."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from hadal.chat import AssistantMessage, UserMessage
from hadal.checkpoint import load
from hadal.encoding import Encoding
from hadal.errors import CheckpointError, HadalError, StorageError
from hadal.model import ModelConfig
from hadal.tools import BashTool
from hadal.train.export import export, load_state
from hadal.train.launch import train
from hadal.train.samples import Conversations
from hadal.train.tokenizer import train_tokenizer
from hadal.train.train_config import TrainConfig

MODEL = dataclasses.replace(
    ModelConfig.nano(), vocab_size=320, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0),
    n_routed_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def make_data(path):
    """What every worker trains on; importable, as workers need it."""
    encoding = Encoding.load("v4", tokenizer=path)
    tasks = [
        (UserMessage(f"Say {n}."), AssistantMessage(f"{n}", reasoning_content="I say it."))
        for n in range(50)
    ]
    return Conversations(encoding, [BashTool.declare()], tasks, seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["Say it. I say it."] * 3, 320, path)
    return path


def config(folder, **changes):
    settings = {
        "steps": 6,
        "tokens_per_worker": 1024,
        "lengths": ((0.0, 1024),),
        "warmup_steps": 2,
        "workers": 2,
    }
    return TrainConfig(model=MODEL, output=folder, **(settings | changes))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["language"], row["norm"]) for row in rows]


@pytest.mark.slow
def test_two_workers_resume_bit_for_bit(tokenizer, tmp_path):
    data = partial(make_data, tokenizer)
    told = []
    train(config(tmp_path / "whole"), data, told.append)
    assert [m["step"] for m in told] == [1, 2, 3, 4, 5, 6]
    killed = tmp_path / "killed"
    program = (
        "from tests.train.test_launch import *\n"
        f"train(config(Path({str(killed)!r}), save_every_s=0.0), partial(make_data, Path({str(tokenizer)!r})))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "from pathlib import Path\n" + program], start_new_session=True
    )
    until = time.monotonic() + 120
    while not (killed / "state.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(config(killed), data)
    assert losses(killed) == losses(tmp_path / "whole")
    states = [
        torch.load(f / "state.pt", weights_only=True)["model"] for f in (killed, tmp_path / "whole")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_a_worker_that_ends_early_is_an_error(tokenizer, tmp_path):
    with pytest.raises(HadalError, match="ended with"):
        train(config(tmp_path), partial(make_data, tmp_path / "nothing.json"))


def test_export(tokenizer, tmp_path):
    from hadal.train.trainer import Trainer

    trainer = Trainer(config(tmp_path, workers=1), make_data(tokenizer))
    trainer.save()
    export(MODEL, tmp_path, tokenizer, tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint")
    assert loaded.config == MODEL.quantized("instruct")
    plain = load_state(MODEL, tmp_path)
    assert torch.equal(plain.embed.weight.bfloat16(), loaded.embed.weight)
    assert (tmp_path / "checkpoint" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    with pytest.raises(CheckpointError):
        export(MODEL, tmp_path, tokenizer, tmp_path / "checkpoint")
    with pytest.raises(StorageError, match="no state of this network"):
        load_state(MODEL, tmp_path / "nothing")

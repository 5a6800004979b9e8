"""A run of two processes: it takes the steps of one with both batches, and goes on after a death."""

import dataclasses
import fcntl
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
from hadal.train.samples import Batch, Conversations
from hadal.train.tokenizer import train_tokenizer
from hadal.train.train_config import TrainConfig

MODEL = dataclasses.replace(
    ModelConfig.nano(), vocab_size=320, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0),
    n_routed_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def make_data(path, kind=Conversations):
    """What every worker trains on; importable, as workers need it."""
    encoding = Encoding.load("v4", tokenizer=path)
    tasks = [
        (UserMessage(f"Say {n}."), AssistantMessage(f"{n}", reasoning_content="I say it."))
        for n in range(50)
    ]
    return kind(encoding, [BashTool.declare()], tasks, seed=1)


class Lopsided(Conversations):
    """The first worker has nearly nothing to learn from, the second one all that there is."""

    def batch(self, step, worker, *, tokens, length):
        batch = super().batch(step, worker, tokens=1280, length=1280)
        if worker == 0:
            learned = (batch.labels_T >= 0).nonzero().flatten()
            batch.labels_T[learned[5:]] = -100
        return batch


class Both(Lopsided):
    """What both workers have, for one."""

    def batch(self, step, worker, *, tokens, length):
        parts = [super(Both, self).batch(step, w, tokens=tokens, length=length) for w in (0, 1)]
        return Batch(
            torch.cat([p.ids_T for p in parts]), torch.cat([p.labels_T for p in parts]),
            [n for p in parts for n in p.lengths],
        )  # fmt: skip


def make_lopsided(path):
    return make_data(path, Lopsided)


def make_both(path):
    return make_data(path, Both)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["Say it. I say it."] * 3, 320, path)
    return path


def config(folder, **changes):
    settings = {
        "steps": 6,
        "tokens_per_worker": 1280,
        "lengths": ((0.0, 1280),),
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
    with pytest.raises(HadalError, match=r"cannot read the tokenizer|ended with"):
        train(config(tmp_path), partial(make_data, tmp_path / "nothing.json"))


def test_what_stops_a_run_is_said(tokenizer, tmp_path):
    data = partial(make_data, tokenizer)
    train(config(tmp_path, workers=1, steps=1), data)
    with pytest.raises(HadalError, match=r"begun with other settings: .*peak_lr: 0.004, now 0.1"):
        train(config(tmp_path, workers=1, steps=1, peak_lr=0.1), data)
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HadalError, match="a training runs in"):
            train(config(tmp_path, workers=1, steps=1), data)


@pytest.mark.slow
def test_two_workers_take_the_step_of_one_with_both_batches(tokenizer, tmp_path):
    """Also where one of them has far more to learn from than the other."""
    norms = []
    for data, workers, tokens in ((make_lopsided, 2, 1280), (make_both, 1, 2560)):
        folder = tmp_path / str(workers)
        run = config(folder, workers=workers, steps=1, tokens_per_worker=tokens)
        train(run, partial(data, tokenizer))
        norms.append(losses(folder)[0][2])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


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

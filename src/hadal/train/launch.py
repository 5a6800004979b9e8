"""The processes of a training run."""

import fcntl
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hadal.errors import ConfigError, HadalError
from hadal.train.memory import kept
from hadal.train.samples import Conversations
from hadal.train.train_config import TrainConfig
from hadal.train.trainer import Trainer

__all__ = ["train"]

Progress = Callable[[dict[str, float]], None]


def train(
    config: TrainConfig, data: Callable[[], Conversations], progress: Progress = lambda _: None
) -> None:
    """Run all workers until the last step; a run whose folder has a state goes on from there.

    Args:
        config: Of the run.
        data: Makes what is trained on, in each worker; importable, as functions of modules and `partial` are.
        progress: Told the metrics of every step.

    Raises:
        HadalError: A worker has ended early, with what it said; another run is in the folder.
        ConfigError: There are not as many GPUs as workers.
    """
    if config.device == "cuda" and (found := torch.cuda.device_count()) < config.workers:
        raise ConfigError(
            f"{config.workers} workers need a GPU each, and there are {found}",
            hint="lower workers, or choose device cpu",
        )
    config.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with kept(), tempfile.TemporaryDirectory(prefix="hadal-train-") as meeting:
        store = f"{meeting}/store"
        workers = [
            context.Process(target=_work, args=(config, data, number, store, theirs), daemon=True)
            for number in range(config.workers)
        ]
        for worker in workers:
            worker.start()
        theirs.close()
        try:
            _follow(ours, workers, progress)
            for worker in workers:
                worker.join()
            _check_ends(workers)
        finally:
            for worker in workers:
                worker.terminate()


def _check_ends(workers: list[Any]) -> None:
    codes = [worker.exitcode for worker in workers]
    if any(codes):
        raise HadalError(
            f"workers of the training ended with {codes}",
            hint="run the same command again to go on",
        )


def _follow(metrics: Any, workers: list[Any], progress: Progress) -> None:
    """Pass metrics on until no worker has more, or one has failed."""
    while True:
        running = [worker.sentinel for worker in workers if worker.exitcode is None]
        ready = wait([metrics, *running])
        if metrics in ready:
            try:
                said = metrics.recv()
            except EOFError:
                return
            if isinstance(said, HadalError):
                raise said
            progress(said)
        else:
            _check_ends(workers)


def _work(
    config: TrainConfig, data: Callable[[], Conversations], number: int, store: str,
    metrics: Any,
) -> None:  # fmt: skip
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    try:
        with _own(config.output) if number == 0 else nullcontext():
            if config.workers > 1:
                dist.init_process_group(
                    "nccl" if config.device == "cuda" else "gloo",
                    init_method=f"file://{store}",
                    rank=number,
                    world_size=config.workers,
                )
            trainer = Trainer(config, data(), number)
            trainer.resume()
            trainer.run(metrics.send)  # which the first one alone calls
    except HadalError as error:
        metrics.send(error)
        sys.exit(1)
    if config.workers > 1:
        dist.destroy_process_group()


@contextmanager
def _own(folder: Path) -> Generator[None]:
    """Hold the folder of a run: two of them would write into one another's files.

    Raises:
        ConfigError: Another one holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"a training runs in {folder} already", hint="wait for it, or give another folder"
            ) from error
        yield

"""The training loop of one process of a run."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hadal.errors import ConfigError, HadalError, StorageError
from hadal.model import Precision, Transformer
from hadal.model.training import TrainingOutput, training_forward
from hadal.train.memory import Trimmer
from hadal.train.metrics import METRICS
from hadal.train.muon import Muon, split_parameters
from hadal.train.product_dtype import product_dtype
from hadal.train.samples import Batch, Conversations
from hadal.train.train_config import TrainConfig

__all__ = ["STATE", "Trainer"]

STATE = "state.pt"
"""In the folder of a run: everything from which it goes on."""


@dataclass(frozen=True)
class _Losses:
    total: Tensor
    shown: dict[str, float]


class Trainer:
    """One worker of a run; all of them take the same steps on their own samples.

    Args:
        config: Of the run.
        data: What is trained on.
        worker: Which of `config.workers` this is.
    """

    def __init__(self, config: TrainConfig, data: Conversations, worker: int = 0) -> None:
        self.config = config
        self.worker = worker
        self._data = data
        _check_lengths(config, data)
        self.device = torch.device("cpu")
        if config.device == "cuda":
            self.device = torch.device("cuda", worker)
            # Sums in an order of their own, so that a run goes on bit for bit there, too.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # Without this every new tensor is filled first: a kernel for each.
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        self.model = Transformer(config.model.plain(), seed=config.seed).to(self.device)
        muon, adamw = split_parameters(self.model)
        settings: dict[str, Any] = {"lr": config.peak_lr, "weight_decay": 0.1}
        if config.optimizer == "adamw":
            muon, adamw = [], muon + adamw
        adam = torch.optim.AdamW(adamw, betas=(0.9, 0.95), eps=1e-20, foreach=True, **settings)
        self._optimizers: list[torch.optim.Optimizer] = [adam]
        if muon:
            self._optimizers.append(Muon(muon, **settings))
        self._grads = _flat_grads([*muon, *adamw])
        self._memory = Trimmer()
        self.step = 0

    # --- state ---

    def _lasting(self) -> dict[str, str]:
        """Return what a run cannot change on its way: its settings, and what it is trained on."""
        return self.config.lasting() | {"data": self._data.digest}

    def save(self) -> None:
        """Write the state; a crash leaves the old one or the new one.

        Raises:
            StorageError: It cannot be written.
        """
        path = self.config.output / STATE
        state = {
            "step": self.step,
            "settings": self._lasting(),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
        }
        try:
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            raise StorageError(f"cannot write the state of training to {path}: {error}") from error

    def resume(self) -> bool:
        """Go on from the state in the folder of the run, if there is one; else take the weights to begin with.

        Raises:
            ConfigError: It was begun with other settings, or these weights are another network's.
            StorageError: There are none.
        """
        path = self.config.output / STATE
        if not path.exists():
            if self.config.begin is not None:
                self._take_weights(self.config.begin)
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        begun, now = state["settings"], self._lasting()
        other = [
            f"{key}: {begun.get(key)}, now {value}"
            for key, value in now.items()
            if begun.get(key) != value
        ]
        if other:
            raise ConfigError(
                f"the run in {path.parent} was begun with other settings: {'; '.join(other)}",
                hint="go on with those, or give it another folder",
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        return True

    def _take_weights(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
        except OSError as error:
            raise StorageError(f"cannot read the state to begin with: {error}") from error
        except RuntimeError as error:
            raise ConfigError(f"{path} is not of this network: {error}") from error

    # --- steps ---

    def run(self, progress: Callable[[dict[str, float]], None] = lambda _: None) -> None:
        """Take the steps that are left.

        Args:
            progress: Told the metrics of every step, in the first worker.

        Raises:
            StorageError: The state or the metrics cannot be written.
        """
        if self.worker:
            while self.step < self.config.steps:
                self.take_step()
            return
        saved = time.monotonic()
        with self._open_metrics() as metrics:
            while self.step < self.config.steps:
                began = time.monotonic()
                shown = self.take_step()
                shown |= {"step": self.step, "seconds": time.monotonic() - began}
                metrics.write(json.dumps(shown) + "\n")
                progress(shown)
                due = time.monotonic() - saved > self.config.save_every_s
                if due or self.step == self.config.steps:
                    self.save()
                    saved = time.monotonic()

    def _open_metrics(self) -> TextIO:
        """Open the metrics, without those of steps that are taken again."""
        path = self.config.output / METRICS
        kept: list[str] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError):  # the last one may be half written
                kept += [f"{line}\n"] if json.loads(line)["step"] <= self.step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.rename(path)
        return path.open("a", buffering=1)

    def take_step(self) -> dict[str, float]:
        """Take one step and return its losses, of this worker's samples."""
        config, step = self.config, self.step
        self._choose_precision(step)
        rate = config.learning_rate(step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self._grads.zero_()
        output, losses = self._losses(step)
        losses.total.backward()
        loads = torch.stack(
            [output.expert_loads[name] for name in sorted(output.expert_loads)]
        ).float()
        if config.workers > 1:
            dist.all_reduce(self._grads)
            dist.all_reduce(loads)
        norm = self._grads.norm()
        if not norm.isfinite():
            raise HadalError(
                f"step {step}: the gradient is not finite",
                hint="the last state is from before it; begin another run with a lower peak_lr",
            )
        self._grads *= (config.clip / (norm + 1e-6)).clamp(max=1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._memory.trim()
        self._move_biases(loads, sorted(output.expert_loads))
        self.step += 1
        return losses.shown | {"lr": rate, "norm": float(norm)}

    def _losses(self, step: int) -> tuple[TrainingOutput, _Losses]:
        config = self.config
        batch = self._data.batch(
            step, self.worker, tokens=config.tokens_per_worker, length=config.length(step)
        )
        dense = step < config.sparse_from * config.steps
        ids_T, labels_T = batch.ids_T.to(self.device), batch.labels_T.to(self.device)
        halves = product_dtype(self.device) is torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=halves):
            output = training_forward(
                self.model, ids_T, batch.lengths, labels_T=labels_T,
                indexer_stage="dense" if dense else "sparse", window=config.window(step), fast=True,
            )  # fmt: skip
            learned, seen = self._shares(batch)
            total = learned * (output.language + config.mtp(step) * output.mtp)
            total = total + seen * (output.indexer + config.balance_weight * output.balance)
        shown = {
            "language": float(output.language.detach()),
            "mtp": float(output.mtp.detach()),
            "indexer": float(output.indexer.detach()),
            "balance": float(output.balance.detach()),
            "tokens": float(len(batch.ids_T)),
            "learned": float((batch.labels_T >= 0).sum()),
        }
        return output, _Losses(total, shown)

    def _shares(self, batch: Batch) -> tuple[float, float]:
        """Return what part of a step's learned tokens, and of all of them, this worker has.

        Losses are means over a worker's tokens: weighted like this their sum is the mean over all.
        """
        counts = [float((batch.labels_T >= 0).sum()), float(len(batch.ids_T))]
        own = torch.tensor(counts, device=self.device)
        every = own.clone()
        if self.config.workers > 1:
            dist.all_reduce(every)
        learned, seen = (own / every.clamp_min(1.0)).tolist()
        return learned, seen

    def _choose_precision(self, step: int) -> None:
        """Round as the stored checkpoint does, towards the end."""
        if step >= self.config.quantize_from * self.config.steps:
            rounded = replace(
                Precision.published(), index_scores_bf16=False, expert_weights_fp4=True,
                linear_weights_fp8=True,
            )  # fmt: skip
            set_precision(self.model, rounded)

    @torch.no_grad()
    def _move_biases(self, loads_LE: Tensor, names: list[str]) -> None:
        """Make experts that had too much less likely, and the others more (V3; spec 7.1)."""
        for name, load_E in zip(names, loads_LE, strict=True):
            bias = self.model.get_submodule(f"{name}.ffn.gate").bias
            assert isinstance(bias, Tensor)
            bias += self.config.bias_speed * (load_E.mean() - load_E).sign()


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Give all parts of a model other roundings."""
    for module in model.modules():
        if hasattr(module, "precision"):
            module.precision = precision  # type: ignore[assignment]


def _check_lengths(config: TrainConfig, data: Conversations) -> None:
    """See that every sample can hold a task, and that every task fits into some.

    Raises:
        ConfigError: Not so.
    """
    lengths = [length for _, length in config.lengths]
    if min(lengths) < data.shortest or max(lengths) < data.longest:
        raise ConfigError(
            f"lengths: samples have {min(lengths)} to {max(lengths)} tokens, and the tasks need"
            f" {data.shortest} to {data.longest}",
            hint="the shortest sample must hold some task and the longest one all of them: none is cut; have more"
            " tokens a sample, or leave out the longer tasks (hadal train run --longest)",
        )


def _flat_grads(parameters: list[nn.Parameter]) -> Tensor:
    """Give all parameters gradients that are parts of one tensor, and return it."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    at = 0
    for parameter in parameters:
        parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return flat

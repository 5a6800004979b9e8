"""Settings of a training run."""

import math
import random
from dataclasses import dataclass, fields
from pathlib import Path

from hadal.config import ModelConfig
from hadal.errors import ConfigError

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        model: Sizes of the network.
        output: Folder of the run: state, metrics, log.
        steps: Optimiser steps.
        begin: State of another run, whose weights this one begins with. Default: random ones.
        tokens_per_worker: Of a step, in samples of equal length; at least one, which may have more.
        lengths: Tokens of a sample, each with the share of the run at which it begins.
        peak_lr: Of both optimisers.
        final_lr: At the end of the cosine.
        warmup_steps: From zero to the peak.
        decay_from: Share of the run at which the cosine begins.
        mtp_weight: Of the loss of multi-token prediction, until the decay begins; then a third of it.
        balance_weight: Of the sequence-wise balance loss.
        bias_speed: Of the routing biases, per step.
        clip: Norm of all gradients.
        sparse_from: Share of the run at which attention follows the indexer, which has learned until then
            from attention over everything.
        quantize_from: Share of the run at which weights and activations are rounded as they will be stored.
        optimizer: `muon` (with AdamW for the rest) or `adamw` alone.
        seed: Of weights and windows.
        narrow_share: Share of steps whose windows are narrower than the model's, so that what is near is found
            in entries, too; how narrow is drawn for each step, from
        narrowest_window: on, in tokens.
        workers: Processes, each with its part of a step.
        device: `cpu`, or `cuda`, where every worker has a GPU of its own.
        save_every_s: Seconds between states.
    """

    model: ModelConfig
    output: Path
    steps: int
    begin: Path | None = None
    tokens_per_worker: int = 4096
    lengths: tuple[tuple[float, int], ...] = ((0.0, 2048), (0.8, 4096))
    peak_lr: float = 4e-3
    final_lr: float = 2e-4
    warmup_steps: int = 100
    decay_from: float = 0.5
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_speed: float = 1e-3
    clip: float = 1.0
    sparse_from: float = 0.4
    quantize_from: float = 0.85
    optimizer: str = "muon"
    seed: int = 1
    narrow_share: float = 0.0
    narrowest_window: int = 8
    workers: int = 2
    device: str = "cpu"
    save_every_s: float = 120.0

    def __post_init__(self) -> None:
        """Check that the values fit together.

        Raises:
            ConfigError: They do not.
        """
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"optimizer: expected 'muon' or 'adamw', got {self.optimizer!r}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device: expected 'cpu' or 'cuda', got {self.device!r}")
        if not 0 < self.narrowest_window <= self.model.sliding_window:
            raise ConfigError(
                f"narrowest_window: expected 1 to {self.model.sliding_window}, got {self.narrowest_window}"
            )
        if not 0 <= self.final_lr <= self.peak_lr:
            raise ConfigError(
                f"final_lr: expected 0 to peak_lr, {self.peak_lr:g}, got {self.final_lr:g}"
            )
        if self.steps < 1 or self.workers < 1:
            raise ConfigError(
                f"steps and workers must be positive, got {self.steps}, {self.workers}"
            )

    def lasting(self) -> dict[str, str]:
        """Return what a run cannot change on its way, as texts."""
        free = ("output", "begin", "save_every_s", "device")
        return {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.name not in free}

    def length(self, step: int) -> int:
        """Return the tokens of a sample in a step."""
        return max((begin, n) for begin, n in self.lengths if step >= begin * self.steps)[1]

    def window(self, step: int) -> int | None:
        """Return the tokens that a query sees beside entries in a step; None for the model's window."""
        draw = random.Random(f"{self.seed}/window/{step}")
        if draw.random() >= self.narrow_share:
            return None
        narrowest = self.narrowest_window
        return round(narrowest * (self.model.sliding_window / narrowest) ** draw.random())

    def learning_rate(self, step: int) -> float:
        """Return the rate: a linear warm-up, a plateau, and a cosine down."""
        decay = self.decay_from * self.steps
        if step < decay:
            return self.peak_lr * min(1.0, (step + 1) / self.warmup_steps)
        share = (step - decay) / max(1.0, self.steps - decay)
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * share)) / 2

    def mtp(self, step: int) -> float:
        """Return the weight of multi-token prediction."""
        return self.mtp_weight if step < self.decay_from * self.steps else self.mtp_weight / 3

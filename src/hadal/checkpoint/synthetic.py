"""Checkpoints that cannot be had: random weights under real names, dtypes and scales."""

from pathlib import Path

from hadal.checkpoint.save import save
from hadal.checkpoint.writer import Layout
from hadal.config import ModelConfig
from hadal.errors import InputError
from hadal.model import Transformer, randomize

__all__ = ["make_random"]


def make_random(
    config: ModelConfig, path: str | Path, *, seed: int = 0, layout: Layout = "official"
) -> None:
    """Write a checkpoint whose every parameter is random, in the stored formats of a config.

    Raises:
        InputError: The seed is not one of torch's.
        CheckpointError: The folder exists and is not empty, or writing failed.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected 0..2^63-1, got {seed}")
    model = Transformer(config.plain())
    randomize(model, seed)
    save(model, path, config=config, layout=layout)

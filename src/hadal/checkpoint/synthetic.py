"""Checkpoints that cannot be had: random weights under real names, dtypes and scales."""

from pathlib import Path

from hadal.checkpoint.save import save
from hadal.checkpoint.writer import Layout
from hadal.config import ModelConfig
from hadal.model import Transformer, randomize

__all__ = ["make_random"]


def make_random(
    config: ModelConfig, path: str | Path, *, seed: int = 0, layout: Layout = "official"
) -> None:
    """Write a checkpoint whose every parameter is random, in the stored formats of a config.

    Raises:
        CheckpointError: The folder exists and is not empty, or writing failed.
    """
    model = Transformer(config.plain())
    randomize(model, seed)
    save(model, path, config=config, layout=layout)

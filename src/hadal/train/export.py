"""From the state of a run to a checkpoint in the official layout."""

import json
import shutil
from pathlib import Path

import torch

from hadal.checkpoint import save
from hadal.config.upstream import to_upstream
from hadal.encoding import note_generation
from hadal.errors import CheckpointError, ConfigError, StorageError
from hadal.model import ModelConfig, Transformer
from hadal.train.trainer import STATE

__all__ = ["export", "keep_config", "load_state"]


def load_state(config: ModelConfig, run: Path) -> Transformer:
    """Return the network of a run as it is now, in plain floats.

    Raises:
        StorageError: The run has no state, or one of another network.
    """
    model = Transformer(config.plain())
    try:
        model.load_state_dict(
            torch.load(run / STATE, map_location="cpu", weights_only=True)["model"]
        )
    except (OSError, RuntimeError, KeyError) as error:
        raise StorageError(f"no state of this network in {run}: {str(error)[:500]}") from error
    return model


def keep_config(config: ModelConfig, tokenizer: Path, run: Path) -> None:
    """Put into the folder of a run what its checkpoint will need beside the state.

    Raises:
        ConfigError: The run was begun with another network or tokenizer.
        StorageError: It cannot be written.
    """
    kept = {
        "config.json": json.dumps(to_upstream(config.plain()), indent=2).encode(),
        "tokenizer.json": tokenizer.read_bytes(),
    }
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name, content in kept.items():
            path = run / name
            if not path.exists():
                partial = path.with_suffix(".partial")
                partial.write_bytes(content)
                partial.rename(path)
            elif path.read_bytes() != content:
                raise ConfigError(
                    f"the run in {run} was begun with another {name}",
                    hint="go on with the same, or give another folder",
                )
    except OSError as error:
        raise StorageError(f"cannot write into {run}: {error}") from error


def export(
    config: ModelConfig, run: Path, tokenizer: Path, folder: Path, *, plain: bool = False
) -> None:
    """Write a checkpoint, its tokenizer, and the generation of its format.

    Args:
        config: Sizes of the network.
        run: Folder of the run.
        tokenizer: Its file.
        folder: Of the checkpoint; it appears when it is complete.
        plain: Keep all weights as they are, instead of FP4 experts and FP8 matrices.

    Raises:
        StorageError: The run has no state of this network.
        CheckpointError: The folder exists and is not empty, or cannot be written.
    """
    stored = config.plain() if plain else config.plain().quantized("instruct")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(load_state(config, run), partial, config=stored)
    shutil.copy(tokenizer, partial / "tokenizer.json")
    note_generation(partial, "v4")
    # A small network is best at what it finds most probable.
    (partial / "generation_config.json").write_text('{"temperature": 0.0}\n')
    try:
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error

"""A `Transformer` to a checkpoint folder."""

from pathlib import Path
from typing import Any

import torch

from hadal.checkpoint.reformat import Reformatted, check_complete
from hadal.checkpoint.source import ModelSource
from hadal.checkpoint.specs import tensor_specs
from hadal.checkpoint.writer import Layout, Progress, write_checkpoint
from hadal.config import ModelConfig, to_upstream
from hadal.model import Transformer

__all__ = ["DEFAULT_SHARD_BYTES", "config_json", "save"]

DEFAULT_SHARD_BYTES = 5 * 10**9


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a checkpoint."""
    return to_upstream(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}


def save(
    model: Transformer,
    path: str | Path,
    *,
    layout: Layout = "official",
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a model in the stored formats of a config, tensor by tensor.

    Args:
        model: In any storage.
        path: Folder to make; it appears when it is complete.
        layout: Official, or Hugging Face (module names of transformers, stacked experts).
        config: Stored formats, e.g. `model.config.quantized("instruct")`; by default the model's.
        dtype: Of tensors that are never quantised; by default the model's, BF16 when quantised.
        max_shard_bytes: Tensor bytes of one file, unless a single tensor is larger.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: The folder exists and is not empty, or writing failed.
        CheckpointMismatchError: The config is another network's.
        InputError: A matrix cannot take the format that is asked for.
    """
    config = config or model.config
    if dtype is None:
        dtype = model.dtype if config.quantization_config is None else torch.bfloat16
    held, target = ModelSource(model), tensor_specs(config, dtype)
    source = Reformatted(held, target)
    check_complete(path, held, source, target)
    write_checkpoint(
        source,
        Path(path),
        config_json(config, dtype),
        layout=layout,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )

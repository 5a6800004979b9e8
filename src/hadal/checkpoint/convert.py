"""From one checkpoint to another: layout to layout, format to format, one tensor at a time."""

from pathlib import Path
from typing import Literal

import torch

from hadal.checkpoint.load import read_checkpoint_config
from hadal.checkpoint.reformat import Reformatted, check_complete
from hadal.checkpoint.save import DEFAULT_SHARD_BYTES, config_json
from hadal.checkpoint.source import CheckpointSource
from hadal.checkpoint.specs import plain_dtype, tensor_specs
from hadal.checkpoint.writer import Layout, Progress, write_checkpoint

__all__ = ["WeightKind", "convert"]

WeightKind = Literal["instruct", "base", "plain"]


def convert(
    source_path: str | Path,
    path: str | Path,
    *,
    layout: Layout,
    weights: WeightKind | None = None,
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Rewrite a checkpoint. Memory holds one tensor, or one expert of a stack, at a time.

    Args:
        source_path: Checkpoint in either layout.
        path: Folder to make; it appears when it is complete.
        layout: Of the result.
        weights: Stored formats of the result: `instruct` (FP4 experts, FP8), `base` (FP8, float32
            scales), `plain` (floats); by default those of the source.
        dtype: Of tensors that are not quantised; by default the source's.
        mtp: False leaves the draft modules out, also those of DSpark checkpoints.
        max_shard_bytes: Tensor bytes of one file, unless a single tensor is larger.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: The source cannot be read, the folder exists, or writing failed.
        CheckpointMismatchError: The source's tensors are not those of its config.
        ConfigError: The source's config.json is not that of a V4 network.
    """
    with CheckpointSource.open(source_path) as source:
        config = read_checkpoint_config(source_path, source, mtp=mtp)
        if not mtp:
            source.drop_mtp()
        if weights is not None:
            config = config.plain() if weights == "plain" else config.quantized(weights)
        dtype = dtype or plain_dtype(source.specs)
        target = tensor_specs(config, dtype)
        reformatted = Reformatted(source, target)
        check_complete(source_path, source, reformatted, target)
        write_checkpoint(
            reformatted,
            Path(path),
            config_json(config, dtype),
            layout=layout,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )

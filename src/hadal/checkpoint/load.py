"""A checkpoint folder to a `Transformer`."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from hadal.checkpoint.reformat import Reformatted, check_complete
from hadal.checkpoint.source import CheckpointSource, Source
from hadal.checkpoint.specs import TensorSpec, plain_dtype
from hadal.checkpoint.writer import Progress
from hadal.config import ModelConfig, WeightQuantization, read_config
from hadal.errors import CheckpointError
from hadal.model import Precision, Transformer

__all__ = ["load", "read_checkpoint_config"]

_EXPERT_FORMATS: dict[torch.dtype, Literal["fp4", "fp8"]] = {
    torch.int8: "fp4",
    torch.float8_e4m3fn: "fp8",
}


def load(
    path: str | Path,
    *,
    storage: Literal["plain", "checkpoint"] = "checkpoint",
    dtype: torch.dtype | None = None,
    precision: Precision | None = None,
    mtp: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Transformer:
    """Load a checkpoint of either layout.

    On the CPU, tensors that need no conversion stay views of the mapped files: opening a large
    checkpoint takes the time to read its headers, and pages come in as they are used.

    Args:
        path: Folder with config.json and the weights.
        storage: `checkpoint` keeps FP8 and FP4 as they are; `plain` makes floats of them.
        dtype: Of activations and of plain tensors; by default that of the stored embedding.
        precision: Simulated roundings; by default `Precision.of` the checkpoint's config.
        mtp: False leaves the draft modules out, and lets DSpark checkpoints load.
        device: Where to put the weights.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: A file is missing or damaged.
        CheckpointMismatchError: Lists all missing, unexpected and ill-shaped tensors.
        ConfigError: config.json is not that of a V4 network.
    """
    with CheckpointSource.open(path) as source:
        config = read_checkpoint_config(path, source, mtp=mtp)
        if not mtp:
            source.drop_mtp()
        dtype = dtype or plain_dtype(source.specs)
        with torch.device("meta"):
            model = Transformer(config, storage=storage, dtype=dtype, precision=precision)
        target = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in model.state_dict().items()}
        reformatted = Reformatted(source, target)
        check_complete(path, source, reformatted, target)
        _fill(model, reformatted, torch.device(device), progress)
    _check_hash_tables(path, model)
    return model


def read_checkpoint_config(
    path: str | Path, source: CheckpointSource, *, mtp: bool = True
) -> ModelConfig:
    """Return the config of a checkpoint, stored formats as its tensors have them.

    config.json alone does not say: its first revision lacks `expert_dtype`, and the Base files name
    UE8M0 scales while the stored ones are float32 (spec 1.2, T10).

    Raises:
        ConfigError: config.json is not that of a V4 network.
        CheckpointError: It names another format of the experts than the tensors have.
    """
    expert = source.specs.get("layers.0.ffn.experts.0.w1.weight")
    found = _EXPERT_FORMATS.get(expert.dtype) if expert else None
    config = read_config(Path(path), expert_dtype=found, mtp=mtp)
    if expert is None:
        return config  # the comparison with the model will say what is missing
    if config.expert_dtype != found:
        raise CheckpointError(
            f"{path}: config.json says that experts are {config.expert_dtype or 'plain floats'}, "
            f"but the stored ones are {found or expert.dtype}",
            hint="correct expert_dtype and quantization_config in config.json",
        )
    scale = source.specs.get("layers.0.attn.wq_a.scale")
    if found is None or scale is None:
        return config
    scale_dtype = "float32" if scale.dtype == torch.float32 else "ue8m0"
    return dataclasses.replace(
        config, quantization_config=WeightQuantization(scale_dtype=scale_dtype)
    )


def _check_hash_tables(path: str | Path, model: Transformer) -> None:
    """Refuse tables that would index experts that do not exist."""
    num_experts = model.config.n_routed_experts
    for name, table in model.named_buffers():
        low, high = (int(v) for v in table.aminmax())
        if low < 0 or high >= num_experts:
            raise CheckpointError(
                f"{path}: {name}: expected experts 0..{num_experts - 1}, got {low}..{high}"
            )


def _fill(
    model: Transformer, source: Source, device: torch.device, progress: Progress | None
) -> None:
    total = sum(spec.num_bytes for spec in source.specs.values())
    done = 0
    for prefix, module in model.named_modules():
        for name in [n for n, t in _own_tensors(module) if t.is_meta]:
            tensor = source.read(f"{prefix}.{name}".lstrip(".")).to(device)
            _assign(module, name, tensor)
            done += tensor.numel() * tensor.element_size()
            if progress is not None:
                progress(done, total)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)

"""Writing safetensors shards tensor by tensor, in either layout.

The format is eight bytes of header length, a JSON header, then the tensors' bytes one after
another (the library's own writer wants a whole shard in memory). A checkpoint is written beside its
place and renamed into it when all of it is on disk, so a crash leaves no half of one.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from hadal.checkpoint.names import expert_stack, to_transformers
from hadal.checkpoint.source import Source
from hadal.checkpoint.specs import TensorSpec
from hadal.errors import CheckpointError, InputError

__all__ = ["Layout", "Progress", "write_checkpoint"]

Layout = Literal["official", "huggingface"]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int8: "I8",
}


@dataclass
class _Entry:
    """One tensor of a file: its parts, under official names, follow one another in its bytes."""

    name: str
    spec: TensorSpec
    parts: list[str]


def write_checkpoint(
    source: Source,
    path: Path,
    config_json: dict[str, Any],
    *,
    layout: Layout,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Write all tensors of a source, an index and config.json into a new folder.

    Raises:
        CheckpointError: The folder exists and is not empty, or writing failed; then nothing is
            left behind.
    """
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and is not an empty folder", hint="choose another path or remove it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: another writer of the same path, here or in another container on the
        # same disk, must not lose its work to our cleaning up.
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as err:
        raise CheckpointError(f"cannot write {path}: {err.strerror or err}") from err
    try:
        _write_files(source, partial, layout, max_shard_bytes, progress)
        _write_text(partial / "config.json", json.dumps(config_json, indent=2) + "\n")
        partial.chmod(0o777 & ~_umask())
        _sync_folder(partial)
        partial.rename(path)  # over an empty folder too, and fails if it has been filled meanwhile
        _sync_folder(path.parent)
    except OSError as err:
        raise CheckpointError(f"cannot write {path}: {err.strerror or err}") from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _write_files(
    source: Source, folder: Path, layout: Layout, max_shard_bytes: int, progress: Progress | None
) -> None:
    entries = _entries(source, layout)
    shards = list(_shards(entries, max_shard_bytes))
    total = sum(e.spec.num_bytes for e in entries)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((e.name for e in shard), file)
        with (folder / file).open("wb") as out:
            out.write(_header(shard))
            for entry in shard:
                start = out.tell()
                for part in entry.parts:
                    done += _write_tensor(source.read(part), out)
                    if progress is not None:
                        progress(done, total)
                assert out.tell() - start == entry.spec.num_bytes, entry.name
            out.flush()
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _entries(source: Source, layout: Layout) -> list[_Entry]:
    """Return the tensors of the file; Hugging Face stacks the experts of a layer."""
    if layout == "official":
        return [_Entry(name, spec, [name]) for name, spec in source.specs.items()]
    stacks: dict[str, list[str]] = {}
    entries: list[_Entry] = []
    for name, spec in source.specs.items():
        stack = expert_stack(name)
        if stack is None:
            entries.append(_Entry(to_transformers(name), spec, [name]))
        else:
            stacks.setdefault(stack, []).append(name)
    return entries + [_stacked(stack, names, source) for stack, names in stacks.items()]


def _stacked(stack: str, names: list[str], source: Source) -> _Entry:
    def place(name: str) -> tuple[int, str]:
        expert_id, matrix = name.split(".")[-3:-1]
        return int(expert_id), matrix  # w1 before w3: gate rows first

    parts = sorted(names, key=place)
    num_experts = len({place(n)[0] for n in parts})
    spec = source.specs[parts[0]]
    rows = sum(source.specs[n].shape[0] for n in parts) // num_experts
    shape = (num_experts, rows, *spec.shape[1:])
    return _Entry(stack, TensorSpec(spec.dtype, shape), parts)


def _shards(entries: list[_Entry], max_bytes: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.spec.num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.spec.num_bytes
    yield shard


def _header(shard: list[_Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        end = offset + entry.spec.num_bytes
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.spec.dtype],
            "shape": list(entry.spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text


def _write_tensor(tensor: Tensor, out: BinaryIO) -> int:
    """Write a tensor's bytes without copying them on the CPU; return how many."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    out.write(data.numpy().data)
    return data.numel()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

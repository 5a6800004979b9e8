"""Where tensors come from: official names to specs, and tensors read one at a time.

`CheckpointSource` maps the files of either layout; `ModelSource` is a model in memory;
`Reformatted` gives another source's matrices in another stored format. All are lazy, so a
conversion holds one tensor at a time.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hadal.checkpoint.names import to_official
from hadal.checkpoint.specs import TensorSpec
from hadal.errors import CheckpointError
from hadal.model import Transformer

__all__ = ["CheckpointSource", "ModelSource", "Source"]


class Source(Protocol):
    """Tensors under their official names."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Return what there is, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


class ModelSource:
    """The tensors of a model, as they are."""

    def __init__(self, model: Transformer) -> None:
        self._state: dict[str, Tensor] = model.state_dict()
        self.specs = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in self._state.items()}

    def read(self, name: str) -> Tensor:
        """Return the model's own tensor, not a copy."""
        return self._state[name].detach()


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}

_MAX_EXPERTS = 65_536
"""More experts than this in one stack are a damaged or hostile header, not a model."""


@dataclass
class CheckpointSource:
    """The files of a checkpoint folder, memory-mapped, in either layout.

    Attributes:
        specs: Every tensor under its official name; stacked experts appear one by one.
    """

    path: Path
    specs: dict[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    _readers: dict[str, Callable[[], Tensor]] = field(
        default_factory=dict[str, Callable[[], Tensor]]
    )
    _open_files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(cls, path: str | Path) -> "CheckpointSource":
        """Map all files of a checkpoint.

        Raises:
            CheckpointError: No such folder, no weights in it, or a file that is damaged, missing
                or disagrees with the index.
        """
        source = cls(Path(path))
        names = _indexed_names(source.path)
        for file in sorted(set(names.values())):
            source._map(source.path / file, {n for n, f in names.items() if f == file})
        return source

    def read(self, name: str) -> Tensor:
        """Return one tensor, as a view of the mapped file where the platform allows."""
        return self._readers[name]()

    def drop_mtp(self) -> None:
        """Leave out the draft modules, whatever their kind."""
        self.specs = {n: s for n, s in self.specs.items() if not n.startswith("mtp.")}

    def close(self) -> None:
        """Unmap the files. Tensors already read stay valid."""
        self._readers.clear()
        self._open_files.close()

    def __enter__(self) -> "CheckpointSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, file: Path, wanted: set[str]) -> None:
        try:
            handle = self._open_files.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"cannot read {file}: {err}",
                hint="the file is missing or cut short; copy it again",
            ) from err
        found = set(handle.keys())
        if wanted != found:
            raise CheckpointError(
                f"{file} and its index disagree: {len(wanted - found)} tensors are missing and "
                f"{len(found - wanted)} are not listed, e.g. {min(wanted ^ found)}"
            )
        for name in found:
            self._add(name, handle)

    def _add(self, name: str, handle: Any) -> None:
        part = handle.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise CheckpointError(f"tensor {name}: unsupported dtype {part.get_dtype()}")
        spec = TensorSpec(dtype, tuple(part.get_shape()))
        official = to_official(name)
        pieces = _unstacked(official, spec)
        if pieces is None:
            self._put(official, spec, lambda: handle.get_tensor(name))
            return
        if spec.num_bytes == 0 or spec.shape[0] > _MAX_EXPERTS:
            raise CheckpointError(f"tensor {name}: not a stack of experts: {spec}")
        for piece, rows, expert_id in pieces:
            shape = (rows.stop - rows.start, *spec.shape[2:])
            self._put(
                piece, TensorSpec(dtype, shape), _expert_reader(handle, name, expert_id, rows)
            )

    def _put(self, name: str, spec: TensorSpec, reader: Callable[[], Tensor]) -> None:
        if name in self.specs:
            raise CheckpointError(f"{self.path}: two tensors stand for {name}")
        self.specs[name] = spec
        self._readers[name] = reader


def _expert_reader(handle: Any, name: str, expert_id: int, rows: slice) -> Callable[[], Tensor]:
    return lambda: handle.get_tensor(name)[expert_id, rows]


def _unstacked(official: str, spec: TensorSpec) -> Iterator[tuple[str, slice, int]] | None:
    """Return the per-expert tensors in a stacked one: name, rows and expert; None if not stacked."""
    prefix, _, leaf = official.rpartition(".")
    if not prefix.endswith(".experts") or len(spec.shape) != 3:
        return None
    suffix = "scale" if leaf.endswith("_scale_inv") else "weight"
    num_experts, num_rows = spec.shape[:2]
    half = num_rows // 2
    if leaf.startswith("gate_up_proj"):  # rows of w1 first, then of w3
        parts = (("w1", slice(0, half)), ("w3", slice(half, num_rows)))
    elif leaf.startswith("down_proj"):
        parts = (("w2", slice(0, num_rows)),)
    else:
        return None
    return (
        (f"{prefix}.{e}.{matrix}.{suffix}", rows, e)
        for e in range(num_experts)
        for matrix, rows in parts
    )


def _indexed_names(path: Path) -> dict[str, str]:
    """Return tensor name to file name, from the index or, without one, from the files."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(k): str(v) for k, v in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise CheckpointError(f"{index} is not a safetensors index: {err!r}") from err
        if outside := [f for f in names.values() if Path(f).name != f]:
            raise CheckpointError(f"{index} names a file outside its folder: {outside[0]!r}")
        return names
    files = sorted(p for p in path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise CheckpointError(
            f"no checkpoint at {path}: expected *.safetensors files",
            hint="`hadal checkpoint make PATH` makes one with random weights",
        )
    names: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                held = dict.fromkeys(handle.keys(), file.name)
        except (OSError, SafetensorError) as err:
            raise CheckpointError(f"cannot read {file}: {err}") from err
        if twice := sorted(names.keys() & held.keys()):
            raise CheckpointError(
                f"{path}: {names[twice[0]]} and {file.name} both hold {twice[0]}",
                hint="remove the stray file, or restore model.safetensors.index.json",
            )
        names |= held
    return names

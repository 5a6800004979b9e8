"""Another stored format for the matrices of a source: quantise, dequantise, FP4 to FP8.

A matrix goes from what the source holds to what the target's specs ask for. FP4 to FP8 is exact
(spec 3.1); plain to FP8 or FP4 rounds; anything to plain is exact in float32.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hadal.checkpoint.source import Source
from hadal.checkpoint.specs import FLOATS, TensorSpec
from hadal.errors import CheckpointMismatchError
from hadal.model import quant

__all__ = ["Reformatted", "check_complete"]

_SCALES = {
    torch.int8: (torch.float8_e8m0fnu, torch.uint8),
    torch.float8_e4m3fn: (torch.float8_e8m0fnu, torch.uint8, torch.float32),
}
"""Dtypes in which the scales of a quantised matrix may be stored; others are no scales."""


class Reformatted:
    """A source whose matrices have the formats, and whose floats the dtypes, of other specs.

    Names that only the source or only the target has are left as the source has them: `load`
    reports them.
    """

    def __init__(self, source: Source, target: Mapping[str, TensorSpec]) -> None:
        self._source = source
        self._target = target
        self._pair: tuple[str, Tensor, Tensor] | None = None
        self.specs = {n: s for n, s in source.specs.items() if not self._is_dropped_scale(n)}
        for name, spec in target.items():
            is_scale = name.endswith(".scale")
            matrix = self._matrix_of(name) if is_scale else name
            held = source.specs.get(matrix)
            if held is None or not self._has_its_scale(matrix, held):
                continue
            if is_scale or _convertible(held, spec):
                self.specs[name] = spec

    def read(self, name: str) -> Tensor:
        """Return a tensor in its new format."""
        stem, _, leaf = name.rpartition(".")
        matrix = f"{stem}.weight"
        quantised = f"{stem}.scale" in self._source.specs or f"{stem}.scale" in self._target
        if leaf not in ("weight", "scale") or not quantised or matrix not in self._source.specs:
            tensor = self._source.read(name)
            wanted = self._target[name].dtype if name in self._target else tensor.dtype
            return tensor if tensor.dtype == wanted else tensor.to(wanted)
        if self._same_format(stem):
            return self._source.read(name)
        if f"{stem}.scale" not in self._target:
            return self._floats(stem).to(self._target[matrix].dtype)
        if self._pair is None or self._pair[0] != stem:  # both halves come from one computation
            self._pair = (stem, *self._quantised(stem))
        _, weight, scale = self._pair
        return weight if leaf == "weight" else scale

    def _is_dropped_scale(self, name: str) -> bool:
        return (
            name.endswith(".scale")
            and name not in self._target
            and self._matrix_of(name) in self._target
        )

    def _has_its_scale(self, matrix: str, held: TensorSpec) -> bool:
        """Return whether a quantised matrix came with a scale of the right shape."""
        scale = self._source.specs.get(matrix.removesuffix("weight") + "scale")
        if held.dtype not in _SCALES:
            return True
        rows, columns = _logical_shape(held)
        fine = (rows, columns // 32), (-(-rows // 128), -(-columns // 128))
        dtypes = _SCALES[held.dtype]
        return (
            scale is not None
            and scale.shape == fine[held.dtype != torch.int8]
            and scale.dtype in dtypes
        )

    @staticmethod
    def _matrix_of(scale_name: str) -> str:
        return scale_name.removesuffix("scale") + "weight"

    def _same_format(self, stem: str) -> bool:
        names = (f"{stem}.weight", f"{stem}.scale")
        ours, theirs = ([m.get(n) for n in names] for m in (self._source.specs, self._target))
        return ours == theirs

    def _floats(self, stem: str) -> Tensor:
        weight = self._source.read(f"{stem}.weight")
        if f"{stem}.scale" not in self._source.specs:
            return weight.float()
        scale = self._source.read(f"{stem}.scale")
        dequantise = quant.dequantize_fp4 if weight.dtype == torch.int8 else quant.dequantize_fp8
        return dequantise(weight, scale)

    def _quantised(self, stem: str) -> tuple[Tensor, Tensor]:
        scale = self._target[f"{stem}.scale"]
        held = self._source.specs[f"{stem}.weight"].dtype
        if self._target[f"{stem}.weight"].dtype == torch.int8:
            return quant.quantize_fp4(self._floats(stem))
        if held == torch.int8:
            names = (f"{stem}.weight", f"{stem}.scale")
            eight, powers = quant.fp4_to_fp8(*(self._source.read(n) for n in names))
            return eight, powers.to(scale.dtype)
        is_fp8 = held == torch.float8_e4m3fn
        if is_fp8 and (powers := self._same_scales(stem, scale.dtype)) is not None:
            return self._source.read(f"{stem}.weight"), powers
        return quant.quantize_fp8(self._floats(stem), scale_dtype=scale.dtype)

    def _same_scales(self, stem: str, dtype: torch.dtype) -> Tensor | None:
        """Return the held scales in another dtype, so that the codes stay; None if it has none."""
        scales = quant.decode_ue8m0(self._source.read(f"{stem}.scale"))
        if dtype == torch.float32:
            return scales
        mantissa, _ = torch.frexp(scales)
        return quant.encode_ue8m0(scales) if bool((mantissa == 0.5).all()) else None


def _convertible(held: TensorSpec, wanted: TensorSpec) -> bool:
    """Return whether the shapes agree, counting two FP4 codes a byte, and both are weights."""
    if held.dtype == wanted.dtype:
        return held.shape == wanted.shape
    weights = (*FLOATS, *_SCALES)
    both = held.dtype in weights and wanted.dtype in weights
    return both and _logical_shape(held) == _logical_shape(wanted)


def _logical_shape(spec: TensorSpec) -> tuple[int, ...]:
    packed = spec.dtype == torch.int8
    return (*spec.shape[:-1], spec.shape[-1] * 2) if packed else spec.shape


def check_complete(
    path: str | Path, held: Source, reformatted: Source, target: Mapping[str, TensorSpec]
) -> None:
    """Check that a source, once reformatted, is exactly the target.

    Raises:
        CheckpointMismatchError: Lists everything that is wrong at once.
    """
    found = reformatted.specs
    missing = [n for n in target if n not in found]
    unexpected = [n for n in found if n not in target]
    mismatched = [
        f"{n}: expected {target[n]}, got {held.specs.get(n, found[n])}"
        for n in target
        if n in found and found[n] != target[n]
    ]
    if missing or unexpected or mismatched:
        raise CheckpointMismatchError(
            f"checkpoint {path}",
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            hint="config.json and the weights may belong to different models",
        )

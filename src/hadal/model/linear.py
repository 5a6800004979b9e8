"""Matrices in the formats they are stored in (spec/model.md 3.1), multiplied in the reference way.

`Linear` holds plain floats, FP8 blocks with a `.scale`, or packed FP4 with a `.scale`; its
`forward` dequantises and multiplies. E4M3 and E2M1 times a power of two are exact in BF16, so that
product has the dtype of the input and equals one of the stored numbers up to the order of summation;
with the float32 scales of the Base checkpoints it runs in float32 and is rounded once.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.model import quant
from hadal.model.kernels.plans import Numbers, matrix
from hadal.model.kernels.products import native_product
from hadal.model.precision import Precision
from hadal.model.product import product
from hadal.model.sharding import WHOLE, Shard, take_rows

__all__ = ["Format", "Formats", "Linear", "Role"]


class Role(StrEnum):
    """What a matrix is for, which decides its stored format."""

    DENSE = "dense"
    """Stored in FP8 by a quantised checkpoint, input quantised."""
    OUTPUT_A = "output_a"
    """wo_a: stored in FP8, but multiplied unquantised (spec 3.2)."""
    EXPERT = "expert"
    """Routed expert: FP4 (instruct) or FP8 (Base), input quantised."""
    PLAIN = "plain"
    """Compressors, weights_proj, gate, embedding, head: never quantised."""


class Format(StrEnum):
    """How the numbers of a matrix are stored."""

    PLAIN = "plain"
    FP8 = "fp8"
    FP4 = "fp4"


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Stored formats and simulated precision of one model."""

    config: ModelConfig
    storage: Literal["plain", "checkpoint"]
    dtype: torch.dtype
    """Of plain tensors and of activations."""
    precision: Precision

    def stored_as(self, role: Role) -> Format:
        """Return the format of a role's matrices."""
        quantised = self.storage == "checkpoint" and self.config.quantization_config is not None
        if not quantised or role is Role.PLAIN:
            return Format.PLAIN
        if role is Role.EXPERT and self.config.expert_dtype == "fp4":
            return Format.FP4
        return Format.FP8

    @property
    def scale_dtype(self) -> torch.dtype:
        """Return the stored dtype of FP8 scales."""
        quantization = self.config.quantization_config
        is_float = quantization is not None and quantization.scale_dtype == "float32"
        return torch.float32 if is_float else torch.float8_e8m0fnu


class Linear(nn.Module):
    """`y = x W^T`, W stored [out, in] in one of three formats.

    Attributes:
        weight: [O, I] floats or float8_e4m3fn, or int8 [O, I/2] with two FP4 codes a byte.
        scale: Of quantised formats; FP8 [ceil(O/128), ceil(I/128)], FP4 [O, I/32].
    """

    def __init__(self, in_features: int, out_features: int, role: Role, formats: Formats) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.role = role
        self.format = formats.stored_as(role)
        self.precision = formats.precision
        self.scale_dtype = formats.scale_dtype
        self.shard = WHOLE
        tiles = (-(-out_features // 128), -(-in_features // 128))
        if self.format is Format.PLAIN:
            self.weight = nn.Parameter(
                torch.empty(out_features, in_features, dtype=formats.dtype),
            )
            self.scale = None
        elif self.format is Format.FP8:
            codes = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
            self._store(codes, torch.empty(tiles, dtype=formats.scale_dtype))
        else:
            codes = torch.empty(out_features, in_features // 2, dtype=torch.int8)
            scale_shape = (out_features, in_features // 32)
            self._store(codes, torch.empty(scale_shape, dtype=torch.float8_e8m0fnu))

    def _store(self, codes: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @property
    def fakes(self) -> bool:
        """Return whether plain numbers are rounded at every use, as if they were stored in fewer bits."""
        if self.format is not Format.PLAIN:
            return False
        if self.role is Role.EXPERT:
            return self.precision.expert_weights_fp4
        return self.role is not Role.PLAIN and self.precision.linear_weights_fp8

    def described(self) -> Numbers | None:
        """Return what kernels read of it; None if they do not take it as it is."""
        return None if self.fakes else matrix(self.weight, self.scale)

    def dense_weight(self) -> Float[Tensor, "O I"]:
        """Return the matrix as floats, with the roundings that `precision` asks for."""
        if self.format is Format.FP8:
            assert self.scale is not None
            return quant.dequantize_fp8(self.weight, self.scale)
        if self.format is Format.FP4:
            assert self.scale is not None
            return quant.dequantize_fp4(self.weight, self.scale)
        if not self.fakes:
            return self.weight
        if self.role is Role.EXPERT:
            return quant.fake_quantize_fp4(self.weight)
        return quant.fake_quantize_fp8(self.weight, scale_dtype=self.scale_dtype)

    def forward(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """Multiply, in the dtype of `x`."""
        rounds = self.precision.activations_fp8 and self.role in (Role.DENSE, Role.EXPERT)
        if not self.fakes:
            y = native_product(x, self.weight, self.scale, rounds=rounds)
            if y is not None:
                return self.shard.gather(y)
        if rounds:
            x = quant.round_trip_activations(x)
        return self.shard.gather(self._columns(x))

    def _columns(self, x: Tensor) -> Tensor:
        weight_OI = self.dense_weight()
        if self.format is Format.FP8 and self.scale_dtype == torch.float32:
            return product(x.float(), weight_OI).to(x.dtype)
        return product(x, weight_OI)

    def divide(self, shard: Shard, *, gathers: bool = True) -> None:
        """Keep this process's outputs only; gather those of all after each product if asked to."""
        rows = shard.part(self.out_features, "outputs of a matrix")
        self.out_features = len(rows)
        take_rows(self, "weight", rows)
        if self.scale is not None:
            take_rows(self, "scale", rows, tile=128 if self.format is Format.FP8 else 1)
        self.shard = shard if gathers else WHOLE

    def extra_repr(self) -> str:
        """Return the sizes and the format, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, format={self.format}"

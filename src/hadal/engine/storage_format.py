"""The formats that blocks keep entries and index keys in; names are those of `hadal cost`.

A format never changes what the model computes: it must hold exactly what attention saw when the entry
was new. So a narrow format asks for a model that rounds before it attends (ARCHITECTURE.md,
invariant 6), and what is read back is bit for bit what was written.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hadal.config import ModelConfig
from hadal.errors import ConfigError
from hadal.model import Precision, quant

__all__ = ["STORAGE_FORMATS", "Codec", "StorageFormat", "default_format", "storage_format"]


@dataclass(frozen=True)
class Codec:
    """Rows of floats to stored rows and back.

    Attributes:
        width: Elements of a stored row.
        dtype: Of a stored element.
        packing: `plain`, `kv` (FP8 + BF16) or `index` (FP4).
        row: Elements of a row of floats.
        rope: Of them, those at the end that are rotated.
    """

    width: int
    dtype: torch.dtype
    packing: str
    row: int
    rope: int

    def pack(self, rows: Tensor) -> Tensor:
        """Return stored rows [C, width]."""
        if self.packing == "kv":
            return quant.quantize_kv_entries(rows, self.rope)
        if self.packing == "index":
            return quant.quantize_index_keys(rows)
        return rows.to(self.dtype)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows [..., row] in a dtype."""
        flat = stored.flatten(0, -2)
        if self.packing == "kv":
            flat = quant.dequantize_kv_entries(flat, self.row, self.rope)
        elif self.packing == "index":
            flat = quant.dequantize_index_keys(flat)
        return flat.to(dtype).unflatten(0, stored.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a stored row."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class StorageFormat:
    """Codecs of a model's entries (and window keys) and of its index keys."""

    name: str
    entries: Codec
    index_keys: Codec


STORAGE_FORMATS: Final = ("fp32", "bf16", "fp8-fp4")


def default_format(dtype: torch.dtype, precision: Precision) -> str:
    """Return the narrowest format that holds what such a model computes."""
    if precision.kv_fp8 and precision.index_fp4:
        return "fp8-fp4"
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def storage_format(
    name: str, config: ModelConfig, dtype: torch.dtype, precision: Precision
) -> StorageFormat:
    """Return a format by name.

    Raises:
        ConfigError: An unknown name, or a format that would round what this model did not.
    """
    row, rope, index = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
    if name not in STORAGE_FORMATS:
        raise ConfigError(
            f"cache_format: expected one of {', '.join(STORAGE_FORMATS)}, got {name!r}"
        )
    if name == "fp8-fp4":
        if not (precision.kv_fp8 and precision.index_fp4):
            raise _narrower(name, "a model that rounds entries to FP8 and index keys to FP4")
        kv_bytes, key_bytes = quant.kv_entry_bytes(row, rope), quant.index_key_bytes(index)
        return StorageFormat(
            name,
            Codec(kv_bytes, torch.uint8, "kv", row, rope),
            Codec(key_bytes, torch.uint8, "index", index, rope),
        )
    if name == "bf16" and dtype != torch.bfloat16:
        raise _narrower(name, "a model in bfloat16")
    stored = torch.bfloat16 if name == "bf16" else torch.float32
    return StorageFormat(
        name, Codec(row, stored, "plain", row, rope), Codec(index, stored, "plain", index, rope)
    )


def _narrower(name: str, needed: str) -> ConfigError:
    return ConfigError(
        f"cache_format {name!r} would round what this model computes exactly: it needs {needed}",
        hint="load the model with that precision and dtype, or leave cache_format out",
    )

"""Bytes that a sequence occupies: what grows with its length, and what is fixed (spec 3.4, 6.1)."""

from dataclasses import dataclass
from typing import Final

from hadal.config import LayerKind, ModelConfig

__all__ = ["KV_FORMATS", "KVFormat", "LayerKV", "kv_by_kind"]


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How entries and index keys are stored."""

    text: str
    entry_bits: int | None = None
    """Bits of every channel; None is the report's format: FP8 with scales, rotated channels BF16."""
    index_bits: int | None = None
    """Bits of every channel; None is FP4 with one scale byte per 32."""
    index_scale_bytes: int = 0

    def entry_bytes(self, config: ModelConfig) -> int:
        """Return the bytes of one window key or compressed entry."""
        if self.entry_bits is not None:
            return config.head_dim * self.entry_bits // 8
        plain = config.head_dim - config.qk_rope_head_dim
        size = plain + 2 * config.qk_rope_head_dim + -(-plain // 64)
        return size + -size % 8

    def index_bytes(self, config: ModelConfig) -> int:
        """Return the bytes of one index key."""
        if self.index_bits is None:
            return config.index_head_dim // 2 + config.index_head_dim // 32
        return config.index_head_dim * self.index_bits // 8 + self.index_scale_bytes


KV_FORMATS: Final[dict[str, KVFormat]] = {
    "fp8-fp4": KVFormat(text="entries FP8 + BF16, index keys FP4 (the report)"),
    "fp8-fp8": KVFormat(
        text="entries FP8 + BF16, index keys FP8", index_bits=8, index_scale_bytes=4
    ),
    "bf16": KVFormat(text="all BF16", entry_bits=16, index_bits=16),
    "fp32": KVFormat(text="all FP32 (the reference model)", entry_bits=32, index_bits=32),
}


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """Cache of all layers of one kind, for one sequence."""

    kind: LayerKind
    num_layers: int
    bytes_per_token: float
    entries_bytes: int
    """At this context, entries and index keys of complete windows."""
    window_bytes: int
    """Ring of the last `sliding_window` keys."""
    tail_bytes: int
    """Float32 buffers of the unfinished compression window."""


def kv_by_kind(config: ModelConfig, context: int, kv_format: KVFormat) -> list[LayerKV]:
    """Return the cache of the main layers by kind; MTP blocks are not counted, as in the report."""
    entry, index = kv_format.entry_bytes(config), kv_format.index_bytes(config)
    width, index_width = config.head_dim, config.index_head_dim
    shapes = {  # rate, bytes of one entry, float32 values buffered
        LayerKind.SWA: (0, 0, 0),
        LayerKind.CSA: (4, entry + index, 8 * 2 * width * 2 + 8 * 2 * index_width * 2),
        LayerKind.HCA: (128, entry, 128 * width * 2),
    }
    return [
        LayerKV(
            kind=kind,
            num_layers=count,
            bytes_per_token=count * size / rate if rate else 0.0,
            entries_bytes=count * size * (context // rate) if rate else 0,
            window_bytes=count * config.sliding_window * entry,
            tail_bytes=count * 4 * buffered,
        )
        for kind, (rate, size, buffered) in shapes.items()
        if (count := config.count(kind))
    ]

"""A flat ragged batch: the tokens of several sequences one after another, without padding.

Padding would be pooled into compression windows (spec T3), so there is none anywhere. Prefill,
chunks of it, decode and any mixture are the same call and differ only in these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from hadal.config import LayerKind, ModelConfig
from hadal.errors import ContextLengthError, InputError
from hadal.model.rope import Rotation, rotation

__all__ = ["RaggedBatch"]


@dataclass(frozen=True)
class RaggedBatch:
    """Where the new tokens of a call lie in their sequences.

    Attributes:
        lengths: New tokens of each sequence.
        starts: Absolute position of the first new token of each.
        rewindable: Whether its caches must keep what `SequenceCache.rewind` needs.
        device: Where the tensors live.
    """

    config: ModelConfig
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    rewindable: tuple[bool, ...]
    device: torch.device

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        ids_T: Int[Tensor, " T"],
        lengths: Sequence[int],
        starts: Sequence[int],
        rewindable: Sequence[bool] | None = None,
    ) -> "RaggedBatch":
        """Check a call's ids and lengths.

        Raises:
            InputError: Ids of another type or shape or outside the vocabulary (spec T13: -1
                padding indexes the hash table from behind), or lengths that do not add up.
            ContextLengthError: A sequence would pass `max_position_embeddings`.
        """
        if not isinstance(ids_T, Tensor) or not all(_is_count(n) for n in lengths):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                "expected token ids as a tensor and lengths as whole numbers, got "
                f"{type(ids_T).__name__} and {list(lengths)}"
            )
        if not lengths:
            raise InputError("lengths: expected at least one sequence, got none")
        if ids_T.dtype not in (torch.int64, torch.int32) or ids_T.ndim != 1:
            raise InputError(
                "token ids: expected a flat int64 or int32 tensor [total_tokens], "
                f"got {ids_T.dtype} {list(ids_T.shape)}",
                hint="batches are flat: concatenate the sequences and pass their lengths",
            )
        if len(lengths) != len(starts) or any(n < 1 for n in lengths):
            raise InputError(
                f"lengths: expected {len(starts)} positive numbers, got {list(lengths)}"
            )
        if sum(lengths) != ids_T.shape[0]:
            raise InputError(
                f"lengths {list(lengths)} add up to {sum(lengths)}, but there are "
                f"{ids_T.shape[0]} token ids"
            )
        low, high = (int(v) for v in ids_T.aminmax()) if ids_T.numel() else (0, 0)
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"token ids: expected 0..{config.vocab_size - 1}, got {low}..{high}",
                hint="there is no padding id: leave padding out",
            )
        longest = max((s + n for s, n in zip(starts, lengths, strict=True)), default=0)
        if longest > config.max_position_embeddings:
            raise ContextLengthError(
                limit=config.max_position_embeddings,
                actual=longest,
                hint="max_position_embeddings of the model config sets the limit",
            )
        keeps = tuple(rewindable) if rewindable is not None else (False,) * len(lengths)
        return cls(config, tuple(lengths), tuple(starts), keeps, ids_T.device)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Rows of each sequence in flat tensors."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return tuple(slice(e - n, e) for e, n in zip(ends, self.lengths, strict=True))

    @cached_property
    def positions_T(self) -> Int[Tensor, " T"]:
        """Absolute position of every token within its own sequence."""
        spans = zip(self.starts, self.lengths, strict=True)
        return torch.cat([torch.arange(s, s + n, device=self.device) for s, n in spans])

    @cached_property
    def _plain_rotation(self) -> Rotation:
        return rotation(self.config, LayerKind.SWA, self.positions_T)

    @cached_property
    def _compressed_rotation(self) -> Rotation:  # CSA and HCA rotate alike
        return rotation(self.config, LayerKind.CSA, self.positions_T)

    def rotation(self, kind: LayerKind) -> Rotation:
        """Return cos and sin of every token for a layer of this kind."""
        return self._plain_rotation if kind is LayerKind.SWA else self._compressed_rotation


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

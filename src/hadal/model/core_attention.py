"""One softmax over the window, the compressed entries and the sink (spec/model.md 2.5).

Keys are values. Work is done in blocks of queries so that memory grows with the keys that a block
can see, never with the square of the sequence. Shape letters: T new tokens of one sequence,
B queries of a block, H heads, K head dim, P window keys, C entries, S selected entries.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hadal.model.cache import EntryStore
from hadal.model.kernels.attention import native_attention
from hadal.model.selection import Selection

__all__ = ["Keys", "core_attention"]

_QUERY_BLOCK = 64


@dataclass(frozen=True)
class Keys:
    """What the new tokens of one sequence attend to.

    Attributes:
        window_PK: Keys of up to `window - 1` tokens before the first query, then of the queries.
        window: Keys that a query sees, itself included.
        entries: Compressed entries so far; None in a layer without.
        visible_T: How many of them each query may see.
        selection: Which of those it does see; None for all.
        sink_H: Raw logit that only the denominator contains; not scaled.
        rotated: Columns of a key that are rotated, the last ones.
    """

    window_PK: Tensor
    window: int
    entries: EntryStore | None
    visible_T: Tensor
    selection: Selection | None
    sink_H: Tensor
    rotated: int = 0

    @cached_property
    def all_entries_CK(self) -> Tensor:
        """Return every entry, read once for all blocks of queries."""
        assert self.entries is not None
        return self.entries.rows()


def core_attention(
    q_THK: Float[Tensor, "T H K"], keys: Keys, *, entry_mass: bool = False
) -> tuple[Float[Tensor, "T H K"], Tensor | None]:
    """Attend with every query of one sequence.

    Returns:
        The outputs, still rotated; and with `entry_mass` the probability that each query put on
        each entry (or selected entry) in the joint softmax, summed over heads, [T, C or S].
    """
    found = None if entry_mass else _native(q_THK, keys)
    if found is not None:
        return found, None
    wider = torch.float32 if q_THK.dtype in (torch.bfloat16, torch.float16) else torch.float64
    outputs: list[Tensor] = []
    masses: list[Tensor] = []
    for start in range(0, q_THK.shape[0], _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, q_THK.shape[0]))
        output, mass = _attend_block(q_THK[rows].to(wider), keys, rows)
        outputs.append(output.to(q_THK.dtype))
        if entry_mass:
            masses.append(mass)
    return torch.cat(outputs), torch.cat(masses) if entry_mass else None


def _native(q_THK: Tensor, keys: Keys) -> Tensor | None:
    """Return the outputs where there is a kernel for them."""
    pages = keys.entries.pages() if keys.entries is not None and len(keys.entries) else None
    if pages is None and keys.entries is not None and len(keys.entries):
        return None
    if torch.is_grad_enabled() and keys.window_PK.requires_grad:
        return None
    index_TS = None if keys.selection is None else keys.selection.index_TS
    return native_attention(
        q_THK,
        keys.window_PK,
        keys.window,
        pages,
        keys.visible_T,
        index_TS,
        keys.sink_H,
        keys.rotated,
    )


def _attend_block(q_BHK: Tensor, keys: Keys, rows: slice) -> tuple[Tensor, Tensor]:
    scale = q_BHK.shape[-1] ** -0.5
    near_PK, near_seen_BP = _window_keys(keys, q_BHK, rows)
    near_PK = near_PK.to(q_BHK.dtype)
    logits = [_masked(torch.einsum("bhk,pk->bhp", q_BHK, near_PK) * scale, near_seen_BP)]
    far, far_seen_BS = _entries(keys, rows)
    far = far if far is None else far.to(q_BHK.dtype)
    one_set = far is not None and far.ndim == 2  # all queries of the block see the same rows
    if far is not None:
        product = "bhk,sk->bhs" if one_set else "bhk,bsk->bhs"
        logits.append(_masked(torch.einsum(product, q_BHK, far) * scale, far_seen_BS))
    probabilities = _softmax_with_sink(torch.cat(logits, dim=-1), keys.sink_H.to(q_BHK.dtype))
    near, rest = probabilities.split(
        (near_PK.shape[0], probabilities.shape[-1] - near_PK.shape[0]), dim=-1
    )
    output = torch.einsum("bhp,pk->bhk", near, near_PK)
    if far is not None:
        product = "bhs,sk->bhk" if one_set else "bhs,bsk->bhk"
        output = output + torch.einsum(product, rest, far)
    return output, rest.sum(dim=1)


def _window_keys(keys: Keys, q_BHK: Tensor, rows: slice) -> tuple[Tensor, Bool[Tensor, "B P"]]:
    """Return the window keys that a block can see, and which of them each query sees."""
    before = keys.window_PK.shape[0] - keys.visible_T.shape[0]
    low = max(rows.start + before - (keys.window - 1), 0)
    near_PK = keys.window_PK[low : rows.stop + before]
    key_row = torch.arange(low, rows.stop + before, device=q_BHK.device)
    query_row = torch.arange(rows.start, rows.stop, device=q_BHK.device).unsqueeze(1) + before
    distance = query_row - key_row
    return near_PK, (distance >= 0) & (distance < keys.window)


def _entries(keys: Keys, rows: slice) -> tuple[Tensor | None, Bool[Tensor, "B S"]]:
    """Return the entries that a block can see: gathered per query, or one set for all."""
    visible_B = keys.visible_T[rows]
    if keys.entries is None:
        return None, visible_B.new_zeros((visible_B.shape[0], 0), dtype=torch.bool)
    if keys.selection is not None:
        index_BS = keys.selection.index_TS[rows]
        return keys.entries.gather(index_BS), keys.selection.valid_TS[rows]
    index_C = torch.arange(len(keys.entries), device=visible_B.device)
    return keys.all_entries_CK, index_C < visible_B.unsqueeze(1)


def _masked(logits_BHS: Tensor, seen_BS: Tensor) -> Tensor:
    return logits_BHS.masked_fill(~seen_BS.unsqueeze(1), float("-inf"))


def _softmax_with_sink(
    logits_BHS: Float[Tensor, "B H S"], sink_H: Float[Tensor, " H"]
) -> Float[Tensor, "B H S"]:
    """Return probabilities that leave room for the sink, in float32."""
    sink_BH1 = sink_H.reshape(1, -1, 1).expand(logits_BHS.shape[0], -1, 1)
    return torch.cat((logits_BHS, sink_BH1), dim=-1).softmax(dim=-1)[..., :-1]

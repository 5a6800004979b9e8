"""The one compressor of CSA, HCA and the indexer (report 2.3.1, 2.3.2; spec/model.md 2.7, 5).

Every `rate` tokens become one entry: a softmax-weighted sum per channel, over the window's tokens
and, with `overlap`, the previous window's as well. Tokens after the last full window wait in
`Tail`, so any split of a sequence gives the same entries.

Shape letters: T new tokens of one sequence, C entries, K entry width, W window (rate), S slots.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hadal.config import LayerKind, ModelConfig
from hadal.model.elementwise import softmax
from hadal.model.kernels.plans import Numbers, addresses
from hadal.model.kernels.pooling import native_pool
from hadal.model.linear import Formats, Linear, Role
from hadal.model.norm import RMSNorm
from hadal.model.product import float32_products
from hadal.model.rope import rotate, rotation

__all__ = ["Compressor", "Tail", "pool_windows"]


@dataclass(frozen=True)
class Tail:
    """What a compressor must remember of the tokens before the next one. Never written in place.

    Attributes:
        rate: W, tokens of a window.
        kv: [t, Kp] projected tokens of the unfinished window, t < W.
        gate: [t, Kp] their pooling logits, positional bias included.
        previous_kv: [W, K] first half of the previous window; zeros at the start.
        previous_gate: [W, K] its logits; -inf at the start, which gives it no weight.
    """

    rate: int
    kv: Tensor
    gate: Tensor
    previous_kv: Tensor
    previous_gate: Tensor

    @property
    def overlap(self) -> bool:
        """Return whether entries reach into the window before their own."""
        return self.previous_kv.shape[0] > 0

    @classmethod
    def fresh(cls, rate: int, width: int, *, overlap: bool, device: torch.device) -> "Tail":
        """Return the state before the first token (spec T9: forgetting this leaks a request)."""
        projected = torch.zeros(
            0, width * (2 if overlap else 1), dtype=torch.float32, device=device
        )
        previous = torch.zeros(rate if overlap else 0, width, dtype=torch.float32, device=device)
        no_weight = torch.full_like(previous, float("-inf"))
        return cls(rate, projected, projected, previous, no_weight)

    def advance(self, kv: Float[Tensor, "T Kp"], gate: Float[Tensor, "T Kp"]) -> "Tail":
        """Return the state after more tokens, on memory of its own."""
        kv, gate = torch.cat((self.kv, kv)), torch.cat((self.gate, gate))
        full = kv.shape[0] // self.rate * self.rate
        if not full:
            return Tail(self.rate, kv, gate, self.previous_kv, self.previous_gate)
        previous = (self.previous_kv, self.previous_gate)
        if self.overlap and full:
            width, last = kv.shape[1] // 2, slice(full - self.rate, full)
            previous = (_own(kv[last, :width]), _own(gate[last, :width]))
        return Tail(self.rate, _own(kv[full:]), _own(gate[full:]), *previous)


def _own(rows: Tensor) -> Tensor:
    """Return rows on memory of their own, so that a large chunk is not kept for a few of them."""
    return rows if torch.is_grad_enabled() else rows.clone()


def pool_windows(
    kv: Float[Tensor, "T Kp"], gate: Float[Tensor, "T Kp"], tail: Tail
) -> Float[Tensor, "C K"]:
    """Pool every window that is now full into one entry, in float32.

    With overlap, an entry has 2W slots: the first half of the channels of the previous window,
    then the second half of the current one.
    """
    rate = tail.rate
    kv, gate = torch.cat((tail.kv, kv)), torch.cat((tail.gate, gate))
    full = kv.shape[0] // rate * rate
    before = (tail.previous_kv, tail.previous_gate) if tail.overlap else None
    found = native_pool(kv[:full], gate[:full], before, rate)
    if found is not None:
        return found
    kv_CWK, gate_CWK = kv[:full].unflatten(0, (-1, rate)), gate[:full].unflatten(0, (-1, rate))
    if not tail.overlap:
        return (softmax(gate_CWK, dim=1) * kv_CWK).sum(dim=1)
    width = kv.shape[1] // 2
    before_kv = torch.cat((tail.previous_kv.unsqueeze(0), kv_CWK[..., :width]))
    before_gate = torch.cat((tail.previous_gate.unsqueeze(0), gate_CWK[..., :width]))
    kv_CSK = torch.cat((before_kv[:-1], kv_CWK[..., width:]), dim=1)
    gate_CSK = torch.cat((before_gate[:-1], gate_CWK[..., width:]), dim=1)
    return (softmax(gate_CSK, dim=1) * kv_CSK).sum(dim=1)


class Compressor(nn.Module):
    """Projections, positional bias and norm around `pool_windows`.

    Attributes:
        ape: [W, Kp] bias of the pooling logits by the place within the window.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, width: int, formats: Formats) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        self.rate = {LayerKind.CSA: 4, LayerKind.HCA: 128}[kind]
        self.overlap = kind is LayerKind.CSA
        self.width = width
        self.dtype = formats.dtype
        projected = width * (2 if self.overlap else 1)
        self.wkv = Linear(config.hidden_size, projected, Role.PLAIN, formats)
        self.wgate = Linear(config.hidden_size, projected, Role.PLAIN, formats)
        self.ape = nn.Parameter(torch.zeros(self.rate, projected, dtype=torch.float32))
        self.norm = RMSNorm(width, config.rms_norm_eps, formats.dtype)

    def fresh_tail(self, device: torch.device) -> Tail:
        """Return the state of a sequence without tokens."""
        return Tail.fresh(self.rate, self.width, overlap=self.overlap, device=device)

    def described(self) -> Numbers | None:
        """Return what kernels read of the projections."""
        wkv, wgate = self.wkv.described(), self.wgate.described()
        return wkv and wgate and [*wkv, *wgate, *addresses(self.ape), self.rate]

    def project(
        self, x_TD: Float[Tensor, "T D"], positions_T: Int[Tensor, " T"]
    ) -> tuple[Tensor, Tensor]:
        """Return keys and pooling logits of any tokens, in float32."""
        x = x_TD.float()
        with float32_products(x.device):
            return self.wkv(x), self.wgate(x) + self.ape[positions_T % self.rate]

    def forward(
        self, kv: Float[Tensor, "T Kp"], gate: Float[Tensor, "T Kp"], tail: Tail, first_entry: int
    ) -> tuple[Float[Tensor, "C K"], Tail]:
        """Return the new entries of one sequence, normed and rotated, and its new tail.

        An entry is rotated at the position of the first token of its own window (spec T6d).

        Args:
            kv: Projected new tokens.
            gate: Their pooling logits.
            tail: State after the tokens before.
            first_entry: Entries that the sequence already has.
        """
        if tail.kv.shape[0] + kv.shape[0] < self.rate:
            return kv.new_empty((0, self.width), dtype=self.dtype), tail.advance(kv, gate)
        pooled = pool_windows(kv, gate, tail)
        entry_idx = torch.arange(first_entry, first_entry + pooled.shape[0], device=kv.device)
        normed = self.norm(pooled.to(self.dtype))
        entries = rotate(normed, rotation(self.config, self.kind, entry_idx * self.rate))
        return entries, tail.advance(kv, gate)

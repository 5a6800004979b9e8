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
from hadal.model.linear import Formats, Linear, Role
from hadal.model.norm import RMSNorm
from hadal.model.rope import rotate, rotation

__all__ = ["Compressor", "Tail", "pool_windows"]


@dataclass(frozen=True)
class Tail:
    """What a compressor must remember of the tokens before the next one. Never written in place.

    Attributes:
        kv: [t, Kp] projected tokens of the unfinished window, t < W.
        gate: [t, Kp] their pooling logits, positional bias included.
        previous_kv: [W, K] first half of the previous window; zeros at the start.
        previous_gate: [W, K] its logits; -inf at the start, which gives it no weight.
    """

    kv: Tensor
    gate: Tensor
    previous_kv: Tensor
    previous_gate: Tensor

    @classmethod
    def fresh(cls, rate: int, width: int, *, overlap: bool, device: torch.device) -> "Tail":
        """Return the state before the first token (spec T9: forgetting this leaks a request)."""
        projected = torch.zeros(
            0, width * (2 if overlap else 1), dtype=torch.float32, device=device
        )
        previous = torch.zeros(rate if overlap else 0, width, dtype=torch.float32, device=device)
        return cls(projected, projected, previous, torch.full_like(previous, float("-inf")))


def pool_windows(
    kv: Float[Tensor, "T Kp"], gate: Float[Tensor, "T Kp"], tail: Tail, *, rate: int, overlap: bool
) -> tuple[Float[Tensor, "C K"], Tail]:
    """Pool every window that is now full into one entry, in float32.

    With `overlap`, an entry has 2W slots: the first half of the channels of the previous window,
    then the second half of the current one.

    Returns:
        The entries of the windows that these tokens closed, and the tail after them.
    """
    kv, gate = torch.cat((tail.kv, kv)), torch.cat((tail.gate, gate))
    full = kv.shape[0] // rate * rate
    kv_CWK, gate_CWK = kv[:full].unflatten(0, (-1, rate)), gate[:full].unflatten(0, (-1, rate))
    rest_kv, rest_gate = kv[full:], gate[full:]
    if not overlap:
        entries = (softmax(gate_CWK, dim=1) * kv_CWK).sum(dim=1)
        return entries, Tail(rest_kv, rest_gate, tail.previous_kv, tail.previous_gate)
    width = kv.shape[1] // 2
    before_kv = torch.cat((tail.previous_kv.unsqueeze(0), kv_CWK[..., :width]))
    before_gate = torch.cat((tail.previous_gate.unsqueeze(0), gate_CWK[..., :width]))
    kv_CSK = torch.cat((before_kv[:-1], kv_CWK[..., width:]), dim=1)
    gate_CSK = torch.cat((before_gate[:-1], gate_CWK[..., width:]), dim=1)
    entries = (softmax(gate_CSK, dim=1) * kv_CSK).sum(dim=1)
    return entries, Tail(rest_kv, rest_gate, before_kv[-1], before_gate[-1])


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

    def project(
        self, x_TD: Float[Tensor, "T D"], positions_T: Int[Tensor, " T"]
    ) -> tuple[Tensor, Tensor]:
        """Return keys and pooling logits of any tokens, in float32."""
        x = x_TD.float()
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
        pooled, tail = pool_windows(kv, gate, tail, rate=self.rate, overlap=self.overlap)
        entry_idx = torch.arange(first_entry, first_entry + pooled.shape[0], device=kv.device)
        normed = self.norm(pooled.to(self.dtype))
        return rotate(normed, rotation(self.config, self.kind, entry_idx * self.rate)), tail

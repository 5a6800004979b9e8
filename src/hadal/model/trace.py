"""What a forward pass chose, kept to be looked at, trained on, or repeated.

Top-k and routing flip on near-ties, so two correct implementations can differ by a whole entry or
expert. `Trace.replay` forces the choices of an earlier pass; what differs then is arithmetic alone.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hadal.errors import InputError
from hadal.model.selection import Selection

__all__ = ["Trace"]


@dataclass
class Trace:
    """Record of one forward pass, by layer name (`layers.3`, `mtp.0`).

    Attributes:
        routes: Expert ids [T, A] of each MoE layer.
        selections: Entry sets of each CSA layer that had to choose, one per sequence.
        replaying: Choices are taken from this record instead of being made.
        indexer_stage: Which indexer loss to compute, if any: `dense` (warm-up: attention over all
            visible entries) or `sparse` (attention and loss over the selected ones).
        window: Tokens that a query sees beside entries, where that is to be fewer than the model's.
        fast: Attend with `training_attention` and route with `training_experts`; no selections are recorded then.
        indexer_losses: One scalar per CSA layer.
        balance_losses: One scalar per learned-routing layer.
        expert_loads: Tokens sent to each expert [E], of each learned-routing layer.
    """

    routes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    selections: dict[str, list[Selection | None]] = field(
        default_factory=dict[str, list[Selection | None]]
    )
    replaying: bool = False
    indexer_stage: Literal["dense", "sparse"] | None = None
    window: int | None = None
    fast: bool = False
    indexer_losses: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    balance_losses: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    expert_loads: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        if self.indexer_stage not in (None, "dense", "sparse"):
            raise InputError(
                f"indexer_stage: expected 'dense', 'sparse' or None, got {self.indexer_stage!r}"
            )

    def begin(self, names: list[str]) -> None:
        """Check that layers of these names may record into, or be replayed from, this trace.

        Raises:
            InputError: A pass was recorded already, or there is none to replay.
        """
        known = [name for name in names if name in self.routes]
        if self.replaying and len(known) < len(names):
            raise InputError(f"trace: no recorded pass of {sorted(set(names) - set(known))}")
        if known and not self.replaying:
            raise InputError(
                f"trace: a pass of {known} has been recorded already",
                hint="use a Trace for one pass, and trace.replay() to repeat its choices",
            )

    def replay(self) -> "Trace":
        """Return a trace that makes another pass repeat the choices of this one."""
        return Trace(routes=self.routes, selections=self.selections, replaying=True)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the sum of a kind of loss over the layers; 0 if there is none."""
        return torch.stack(list(losses.values())).sum() if losses else torch.zeros(())

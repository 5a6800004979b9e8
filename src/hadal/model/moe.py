"""Mixture of experts: hash and learned routing, routed and shared experts (spec/model.md 2.9).

Shape letters: T tokens, D model dim, E experts, A active experts a token, F expert hidden dim,
V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.model.batch import RaggedBatch
from hadal.model.elementwise import silu, softplus
from hadal.model.linear import Formats, Linear, Role
from hadal.model.losses import balance_loss
from hadal.model.product import product
from hadal.model.sharding import WHOLE, Shard
from hadal.model.trace import Trace
from hadal.model.training_experts import training_experts

__all__ = ["Expert", "Gate", "MoE"]


class Gate(nn.Module):
    """Scores of the experts, and which of them a token goes to.

    Attributes:
        bias: [E] added to the scores for the choice only, moved by the trainer to balance load;
            None in a hash layer.
        tid2eid: [V, A] experts of each token id; None in a learned layer.
    """

    tid2eid: Tensor | None

    def __init__(self, config: ModelConfig, *, hashed: bool, formats: Formats) -> None:
        super().__init__()
        self.config = config
        self.in_float32 = formats.precision.gate_float32
        self.weight = nn.Parameter(
            torch.empty(config.n_routed_experts, config.hidden_size, dtype=formats.dtype)
        )
        table = None
        if hashed:
            shape = (config.vocab_size, config.num_experts_per_tok)
            table = torch.zeros(shape, dtype=torch.int64)
        self.register_buffer("tid2eid", table)
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.bias = None if hashed else nn.Parameter(bias, requires_grad=False)

    def scores(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return `sqrt(softplus(x W^T))`, from float32 logits unless `precision` says otherwise."""
        dtype = torch.float32 if self.in_float32 else x_TD.dtype
        return softplus(product(x_TD.to(dtype), self.weight.to(dtype)).float()).sqrt()

    def choose(self, scores_TE: Float[Tensor, "T E"], ids_T: Tensor) -> Int[Tensor, "T A"]:
        """Return the experts of each token; equal scores go to the lowest index."""
        if self.tid2eid is not None:
            return self.tid2eid[ids_T]
        assert self.bias is not None
        order = (scores_TE.detach() + self.bias).sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.config.num_experts_per_tok]

    def weights(
        self, scores_TE: Float[Tensor, "T E"], routes_TA: Int[Tensor, "T A"]
    ) -> Float[Tensor, "T A"]:
        """Return the weights of the chosen experts: scores without bias, normalised, scaled."""
        chosen = scores_TE.gather(1, routes_TA)
        return chosen / chosen.sum(dim=1, keepdim=True) * self.config.routed_scaling_factor


class Expert(nn.Module):
    """SwiGLU with clamped inputs; routed and shared experts are alike."""

    def __init__(self, config: ModelConfig, role: Role, formats: Formats) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.w1 = Linear(hidden, inner, role, formats)
        self.w2 = Linear(inner, hidden, role, formats)
        self.w3 = Linear(hidden, inner, role, formats)

    def divide(self, shard: Shard) -> None:
        """Keep this process's columns of every matrix."""
        for matrix in (self.w1, self.w2, self.w3):
            matrix.divide(shard)

    def forward(
        self, x_TD: Float[Tensor, "T D"], weight_T: Float[Tensor, " T"] | None = None
    ) -> Float[Tensor, "T D"]:
        """Return the output, times `weight_T` applied before `w2` (its input may be quantised).

        The gate is clamped from above only, before SiLU; the linear part on both sides (spec T12).
        """
        gate = self.w1(x_TD).float().clamp(max=self.limit)
        up = self.w3(x_TD).float().clamp(-self.limit, self.limit)
        inner = silu(gate) * up
        if weight_T is not None:
            inner = weight_T.unsqueeze(1) * inner
        return self.w2(inner.to(x_TD.dtype))


class MoE(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, config: ModelConfig, name: str, *, hashed: bool, formats: Formats) -> None:
        super().__init__()
        self.name = name
        self.shard = WHOLE
        self.own = range(config.n_routed_experts)
        self.gate = Gate(config, hashed=hashed, formats=formats)
        self.experts = nn.ModuleList(
            Expert(config, Role.EXPERT, formats) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = Expert(config, Role.DENSE, formats)

    def divide(self, shard: Shard) -> None:
        """Keep this process's routed experts, and its columns of the shared one."""
        self.own = shard.part(len(self.experts), "routed experts")
        for expert_id in set(range(len(self.experts))) - set(self.own):
            self.experts[expert_id] = nn.Module()
        self.shared_experts.divide(shard)
        self.shard = shard

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        ids_T: Int[Tensor, " T"],
        batch: RaggedBatch,
        trace: Trace | None,
    ) -> Float[Tensor, "T D"]:
        """Return the weighted sum of each token's experts and the shared one, summed in float32."""
        scores_TE = self.gate.scores(x_TD)
        if trace is not None and trace.replaying:
            routes_TA = trace.routes[self.name]
        else:
            routes_TA = self.gate.choose(scores_TE, ids_T)
        weights_TA = self.gate.weights(scores_TE, routes_TA)
        if trace is not None and not trace.replaying:
            self._record(trace, scores_TE, routes_TA, batch)
        if self.shard is not WHOLE:
            routed = self._routed_by_all(x_TD, routes_TA, weights_TA)
        elif trace is not None and trace.fast:
            matrices = [(e.w1, e.w2, e.w3) for e in self.experts if isinstance(e, Expert)]
            limit = self.shared_experts.limit
            routed = training_experts(matrices, x_TD, routes_TA, weights_TA, limit=limit)
        else:
            routed = self._routed(x_TD, routes_TA, weights_TA)
        return (routed + self.shared_experts(x_TD).float()).to(x_TD.dtype)

    def _routed(self, x_TD: Tensor, routes_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Visit the experts in order, so that a token's sum has one order in every batch."""
        total_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert_id in routes_TA.unique().tolist():
            token, slot = torch.where(routes_TA == expert_id)
            output = self.experts[expert_id](x_TD[token], weights_TA[token, slot])
            total_TD = total_TD.index_add(0, token, output.float())
        return total_TD

    def _routed_by_all(self, x_TD: Tensor, routes_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Let every process run its experts; then sum in the same order as one process does."""
        output_TAD = x_TD.new_zeros((*routes_TA.shape, x_TD.shape[1]), dtype=torch.float32)
        for expert_id in self.own:
            token, slot = torch.where(routes_TA == expert_id)
            if token.shape[0]:
                output = self.experts[expert_id](x_TD[token], weights_TA[token, slot])
                output_TAD[token, slot] = output.float()
        output_TAD = self.shard.combine(output_TAD)
        order_TA = routes_TA.argsort(dim=1, stable=True)
        total_TD = torch.zeros_like(output_TAD[:, 0])
        for slot_T in order_TA.unbind(1):
            total_TD += output_TAD[torch.arange(slot_T.shape[0], device=slot_T.device), slot_T]
        return total_TD

    def _record(
        self, trace: Trace, scores_TE: Tensor, routes_TA: Tensor, batch: RaggedBatch
    ) -> None:
        trace.routes[self.name] = routes_TA
        if self.gate.bias is None:  # hash layers have neither loss nor bias
            return
        losses = [balance_loss(scores_TE[rows], routes_TA[rows]) for rows in batch.slices]
        trace.balance_losses[self.name] = torch.stack(losses).mean()
        trace.expert_loads[self.name] = torch.bincount(
            routes_TA.flatten(), minlength=scores_TE.shape[1]
        )

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
from hadal.model.kernels.experts import (
    Matrices,
    native_experts,
    native_routes,
    native_swiglu,
)
from hadal.model.kernels.layers import feed_forward
from hadal.model.kernels.native import has_kernel
from hadal.model.kernels.plans import Numbers, addresses, matrix, tables_of
from hadal.model.linear import Formats, Linear, Role
from hadal.model.losses import balance_loss
from hadal.model.product import float32_products, product
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
        if not self.in_float32:
            return softplus(product(x_TD, self.weight).float()).sqrt()
        with float32_products(x_TD.device):
            return softplus(product(x_TD.float(), self.weight)).sqrt()

    def choose(self, scores_TE: Float[Tensor, "T E"], ids_T: Tensor) -> Int[Tensor, "T A"]:
        """Return the experts of each token; equal scores go to the lowest index."""
        if self.tid2eid is not None:
            return self.tid2eid[ids_T]
        assert self.bias is not None
        order = (scores_TE.detach() + self.bias).sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.config.num_experts_per_tok]

    def native_routes(
        self, x_TD: Tensor, ids_T: Tensor, given_TA: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return what `choose` (or what is given for it) and `weights` do where there is a kernel for it."""
        if not self.in_float32:
            return None
        active, factor = self.config.num_experts_per_tok, self.config.routed_scaling_factor
        table, bias = self.tid2eid, self.bias
        if given_TA is not None:  # as if every token were of a kind of its own
            table, bias, ids_T = given_TA.contiguous(), None, torch.arange(ids_T.shape[0])
        return native_routes(x_TD, self.weight, bias, table, ids_T, active, factor)

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
        for linear in (self.w1, self.w2, self.w3):
            linear.divide(shard)

    def as_stored(self) -> Matrices | None:
        """Return w1, w3 and w2 with their scales; None if they are rounded before use."""
        matrices = (self.w1, self.w3, self.w2)
        return None if self.w1.fakes else [(m.weight, m.scale) for m in matrices]

    def forward(
        self, x_TD: Float[Tensor, "T D"], weight_T: Float[Tensor, " T"] | None = None
    ) -> Float[Tensor, "T D"]:
        """Return the output, times `weight_T` applied before `w2` (its input may be quantised).

        The gate is clamped from above only, before SiLU; the linear part on both sides (spec T12).
        """
        gate, up = self.w1(x_TD), self.w3(x_TD)
        found = native_swiglu(gate, up, self.limit, weight_T)
        if found is not None:
            return self.w2(found)
        gate = gate.float().clamp(max=self.limit)
        up = up.float().clamp(-self.limit, self.limit)
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
        if trace is None and self.shard is WHOLE and has_kernel(x_TD):
            tables = tables_of(self, self.described)
            if tables is not None and tables[0] is not None:
                return self._at_once(x_TD, ids_T, tables[0])
        routes_TA, weights_TA = self._route(x_TD, ids_T, batch, trace)
        fast = trace is not None and trace.fast
        if self.shard is not WHOLE:
            routed = self._routed_by_all(x_TD, routes_TA, weights_TA)
        elif fast:
            matrices = [(e.w1, e.w2, e.w3) for e in self.experts if isinstance(e, Expert)]
            limit = self.shared_experts.limit
            routed = training_experts(matrices, x_TD, routes_TA, weights_TA, limit=limit)
        elif (y_TD := self._native(x_TD, routes_TA, weights_TA)) is not None:
            return y_TD
        else:
            routed = self._routed(x_TD, routes_TA, weights_TA)
        return (routed + self.shared_experts(x_TD).float()).to(x_TD.dtype)

    def described(self) -> tuple[Numbers | None]:
        """Return what kernels read of the gate and of all experts; None if they do not take some of it."""
        gate, numbers = matrix(self.gate.weight, None), list[int]()
        if gate is None or not self.gate.in_float32:
            return (None,)
        for expert in (*self.experts, self.shared_experts):
            assert isinstance(expert, Expert)
            for linear in (expert.w1, expert.w3, expert.w2):
                if (described := linear.described()) is None:
                    return (None,)
                numbers += described
        return ([*gate, *addresses(self.gate.bias, self.gate.tid2eid), *numbers],)

    def _at_once(self, x_TD: Tensor, ids_T: Tensor, table: Tensor) -> Tensor:
        config, shared = self.gate.config, self.shared_experts
        return feed_forward(
            x_TD.contiguous(), ids_T.long(), table, experts=len(self.experts) + 1, active=config.num_experts_per_tok,
            factor=config.routed_scaling_factor, limit=shared.limit, rounds=shared.w1.precision.activations_fp8,
        )  # fmt: skip

    def _route(
        self, x_TD: Tensor, ids_T: Tensor, batch: RaggedBatch, trace: Trace | None
    ) -> tuple[Tensor, Tensor]:
        """Return the experts of each token and their weights; record them, or repeat those of a trace."""
        given_TA = trace.routes[self.name] if trace is not None and trace.replaying else None
        found = self.gate.native_routes(x_TD, ids_T, given_TA)
        scores_TE = self.gate.scores(x_TD) if found is None or trace is not None else None
        if found is None:
            assert scores_TE is not None
            routes_TA = self.gate.choose(scores_TE, ids_T) if given_TA is None else given_TA
            found = routes_TA, self.gate.weights(scores_TE, routes_TA)
        if trace is not None and not trace.replaying:
            assert scores_TE is not None
            self._record(trace, scores_TE, found[0], batch)
        return found

    def _native(self, x_TD: Tensor, routes_TA: Tensor, weights_TA: Tensor) -> Tensor | None:
        """Return the sum of all experts where there are kernels for it."""
        if not has_kernel(x_TD, weights_TA):
            return None
        routed: dict[int, Matrices] = {}
        for number in set(routes_TA.flatten().tolist()):
            expert = self.experts[number]
            assert isinstance(expert, Expert)
            if (matrices := expert.as_stored()) is None:
                return None
            routed[number] = matrices
        if (shared := self.shared_experts.as_stored()) is None:
            return None
        rounds = self.shared_experts.w1.precision.activations_fp8
        limit = self.shared_experts.limit
        return native_experts(x_TD, routes_TA, weights_TA, routed, shared, limit, rounds=rounds)

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

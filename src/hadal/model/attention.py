"""Hybrid attention: sliding window, CSA or HCA entries, sink (report 2.3; spec/model.md 2.4-2.8).

Projections run over all tokens of the batch at once; what depends on a sequence's own past (window,
compressor, selection, softmax) runs sequence by sequence. Shape letters: T tokens, D model dim,
H heads, K head dim, R width of the query latent, G output groups.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hadal.config import LayerKind, ModelConfig
from hadal.model import quant
from hadal.model.batch import RaggedBatch
from hadal.model.cache import LayerCache, Step
from hadal.model.compressor import Compressor
from hadal.model.core_attention import Keys, core_attention
from hadal.model.indexer import Indexer
from hadal.model.kernels.layers import Sizes, attention_output, project
from hadal.model.kernels.native import has_kernel
from hadal.model.kernels.plans import Numbers, addresses, tables_of
from hadal.model.kernels.products import native_product
from hadal.model.kernels.vectors import native_vectors
from hadal.model.linear import Formats, Linear, Role
from hadal.model.losses import indexer_loss
from hadal.model.norm import RMSNorm, rms_norm
from hadal.model.product import product
from hadal.model.rope import Rotation, rotate
from hadal.model.selection import Selection, all_visible, visible_entries
from hadal.model.sharding import WHOLE, Shard, take_rows
from hadal.model.trace import Trace
from hadal.model.training_attention import training_attention

__all__ = ["Attention"]

Projected = dict[str, Tensor]
"""Per-token inputs of the parts that run sequence by sequence, by name, all [T, ...]."""


class Attention(nn.Module):
    """Shared-KV multi-query attention of one layer."""

    def __init__(self, config: ModelConfig, name: str, kind: LayerKind, formats: Formats) -> None:
        super().__init__()
        heads, width, latent = config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.config = config
        self.name = name
        self.kind = kind
        self.precision = formats.precision
        self.shard = WHOLE
        self.num_heads = heads
        self.num_groups = config.o_groups
        self.wq_a = Linear(config.hidden_size, latent, Role.DENSE, formats)
        self.q_norm = RMSNorm(latent, config.rms_norm_eps, formats.dtype)
        self.wq_b = Linear(latent, heads * width, Role.DENSE, formats)
        self.wkv = Linear(config.hidden_size, width, Role.DENSE, formats)
        self.kv_norm = RMSNorm(width, config.rms_norm_eps, formats.dtype)
        group_in, group_out = config.heads_per_group * width, config.o_groups * config.o_lora_rank
        self.wo_a = Linear(group_in, group_out, Role.OUTPUT_A, formats)
        self.wo_b = Linear(group_out, config.hidden_size, Role.DENSE, formats)
        self.attn_sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        has_entries = kind is not LayerKind.SWA
        self.compressor = Compressor(config, kind, width, formats) if has_entries else None
        self.indexer = Indexer(config, formats) if kind is LayerKind.CSA else None

    def new_cache(self, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return the state of a sequence without tokens."""
        window = torch.zeros(0, self.config.head_dim, dtype=dtype, device=device)
        cache = LayerCache(window, self.config.sliding_window)
        if self.compressor is not None:
            cache.tail = self.compressor.fresh_tail(device)
        if self.indexer is not None:
            cache.index_tail = self.indexer.compressor.fresh_tail(device)
        return cache

    def divide(self, shard: Shard) -> None:
        """Keep this process's heads and output groups. Keys, entries and indexer serve all heads."""
        heads = shard.part(self.num_heads, "attention heads")
        self.num_groups = len(shard.part(self.num_groups, "output groups"))
        self.num_heads = len(heads)
        self.wq_b.divide(shard, gathers=False)
        take_rows(self, "attn_sink", heads)
        self.wo_a.divide(shard, gathers=False)
        self.wo_b.divide(shard)
        self.shard = shard

    def takes(self, cache: LayerCache, dtype: torch.dtype) -> bool:
        """Return whether a state is one of this layer's, in this dtype."""
        return (
            cache.window.dtype == dtype
            and cache.window.shape[1] == self.config.head_dim
            and (cache.tail is None) == (self.compressor is None)
            and (cache.index_tail is None) == (self.indexer is None)
        )

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        batch: RaggedBatch,
        caches: list[LayerCache],
        trace: Trace | None,
    ) -> Float[Tensor, "T D"]:
        """Attend within each sequence; `caches` hold its past and take up the new tokens."""
        tables = self._tables(x_TD)
        if trace is None and tables is not None and tables[0] is not None:
            projected = self._project_at_once(x_TD, batch, tables[0])
        else:
            projected = self._project(x_TD, batch, training=trace is not None)
        # Not slices: the gradient of each would be a tensor of the whole batch.
        one = len(caches) == 1
        parts = {n: (t,) if one else t.split(batch.lengths) for n, t in projected.items()}
        outputs: list[Tensor] = []
        losses: list[Tensor] = []
        for sequence_idx, cache in enumerate(caches):
            own = {name: tensors[sequence_idx] for name, tensors in parts.items()}
            cache.step = self._step(own, cache) if batch.rewindable[sequence_idx] else None
            output, loss = self._attend(own, cache, sequence_idx, trace)
            outputs.append(output)
            losses += loss
        if trace is not None and losses:
            total = torch.cat(losses)  # empty where no query sees an entry yet
            trace.indexer_losses[self.name] = total.sum() / max(total.numel(), 1)
        return self._output(_joined(outputs), batch, tables)

    def _output(
        self, o_THK: Tensor, batch: RaggedBatch, tables: list[Tensor | None] | None
    ) -> Tensor:
        rotation = batch.rotation(self.kind)
        if tables is not None and tables[1] is not None:
            return attention_output(
                o_THK, rotation, tables[1], groups=self.num_groups, middle=self.wo_a.out_features,
                outer=self.wo_b.out_features, rounds=self.precision.activations_fp8,
            )  # fmt: skip
        o_THK = rotate(o_THK, rotation, inverse=True)
        return self.wo_b(self.shard.gather(self._grouped_projection(o_THK)))

    def _project(self, x_TD: Tensor, batch: RaggedBatch, *, training: bool) -> Projected:
        """Compute everything that a token needs no other token for."""
        rotation = batch.rotation(self.kind)
        latent_TR = self.q_norm(self.wq_a(x_TD))
        q_THK = self.wq_b(latent_TR).unflatten(-1, (self.num_heads, -1))
        projected = {
            "position": batch.positions_T,
            "query": self._queries(q_THK, rotation),
            "window": self._window_keys(self.wkv(x_TD), rotation),
        }
        if self.compressor is not None:
            kv, gate = self.compressor.project(x_TD, batch.positions_T)
            projected |= {"kv": kv, "gate": gate}
        if self.indexer is not None:
            if training:  # its only gradient is that of its own loss (spec 7.1)
                x_TD, latent_TR = x_TD.detach(), latent_TR.detach()
            query, weight = self.indexer.queries(latent_TR, x_TD, rotation)
            kv, gate = self.indexer.compressor.project(x_TD, batch.positions_T)
            projected |= {"index_query": query, "index_weight": weight}
            projected |= {"index_kv": kv, "index_gate": gate}
        return projected

    def _project_at_once(self, x_TD: Tensor, batch: RaggedBatch, table: Tensor) -> Projected:
        """Return what `_project` does, in one call."""
        scale = self.indexer.scale if self.indexer is not None else 0.0
        projected = project(
            x_TD, batch.positions_T, batch.rotation(self.kind), table, self.sizes, eps=self.config.rms_norm_eps,
            index_scale=scale, rounds=self.precision.activations_fp8, as_kept=self.precision.kv_fp8,
        )  # fmt: skip
        if self.indexer is not None:
            projected["index_query"] = self.indexer.simulate_storage(projected["index_query"])
        return {"position": batch.positions_T} | projected

    def _tables(self, x: Tensor) -> list[Tensor | None] | None:
        """Return what kernels read of the matrices: those before, and those after the softmax."""
        if self.shard is not WHOLE or not has_kernel(x) or not x.is_contiguous():
            return None
        return tables_of(self, self.described)

    def described(self) -> tuple[Numbers | None, Numbers | None]:
        """Return what kernels read of the matrices before the softmax, and of those behind it."""
        before = [self.wq_a.described(), addresses(self.q_norm.weight), self.wq_b.described()]
        before += [self.wkv.described(), addresses(self.kv_norm.weight)]
        before += [part.described() for part in (self.compressor, self.indexer) if part is not None]
        after = [self.wo_a.described(), self.wo_b.described()]
        return _whole(before), _whole(after)

    @cached_property
    def sizes(self) -> Sizes:
        """What its matrices make."""
        main, indexer = self.compressor, self.indexer
        return Sizes(
            kind=0 if main is None else 1 if indexer is None else 2,
            latent=self.wq_a.out_features,
            heads=self.num_heads,
            head_dim=self.config.head_dim,
            compressed=0 if main is None else main.wkv.out_features,
            index_heads=self.config.index_n_heads,
            index_dim=self.config.index_head_dim,
            index_compressed=0 if indexer is None else indexer.compressor.wkv.out_features,
        )

    def _queries(self, q_THK: Tensor, rotation: Rotation) -> Tensor:
        eps = self.config.rms_norm_eps
        found = native_vectors(q_THK, norm=eps, rotation=rotation)
        return rotate(rms_norm(q_THK, eps), rotation) if found is None else found

    def _window_keys(self, kv_TK: Tensor, rotation: Rotation) -> Tensor:
        norm = self.kv_norm
        rounds = self.precision.kv_fp8
        found = native_vectors(
            kv_TK, norm=norm.eps, weight=norm.weight, rotation=rotation, as_kept=rounds
        )
        return self.simulate_storage(rotate(norm(kv_TK), rotation)) if found is None else found

    def _step(self, own: Projected, cache: LayerCache) -> Step:
        """Return what a later rewind needs of this call."""
        return Step(
            before=cache.slot,
            window=own["window"],
            compressed=(own["kv"], own["gate"]) if self.compressor is not None else None,
            index_compressed=(
                (own["index_kv"], own["index_gate"]) if self.indexer is not None else None
            ),
        )

    def _attend(
        self, own: Projected, cache: LayerCache, sequence_idx: int, trace: Trace | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Extend one sequence's cache by its new tokens, then attend: a token sees itself."""
        window_PK = cache.extend_window(own["window"])
        self._compress(own, cache)
        rate = self.compressor.rate if self.compressor is not None else 1
        visible_T = visible_entries(own["position"], rate)
        if trace is not None and trace.fast:
            return self._attend_fast(own, cache, visible_T, trace)
        selection, scores_TS = self._select(own, cache, visible_T, sequence_idx, trace)
        keys = Keys(
            window_PK=window_PK,
            window=self._window(trace),
            entries=cache.entries if self.compressor is not None else None,
            visible_T=visible_T,
            selection=selection,
            sink_H=self.attn_sink,
            rotated=self.config.qk_rope_head_dim,
        )
        output, mass_TS = core_attention(own["query"], keys, entry_mass=scores_TS is not None)
        if scores_TS is None or mass_TS is None:
            return output, []
        seen_TS = all_visible(visible_T, scores_TS) if selection is None else selection.valid_TS
        return output, [indexer_loss(scores_TS, mass_TS, seen_TS)]

    def _attend_fast(
        self, own: Projected, cache: LayerCache, visible_T: Tensor, trace: Trace
    ) -> tuple[Tensor, list[Tensor]]:
        has_entries, indexed = self.compressor is not None, self.indexer is not None
        return training_attention(
            own,
            cache.entries.rows() if has_entries else None,
            cache.index_keys.rows() if indexed else None,
            visible_T,
            self.attn_sink,
            window=self._window(trace),
            top_k=self.config.index_topk if indexed and trace.indexer_stage != "dense" else None,
            with_loss=indexed and trace.indexer_stage is not None,
        )

    def _window(self, trace: Trace | None) -> int:
        whole = self.config.sliding_window
        return whole if trace is None or trace.window is None else min(trace.window, whole)

    def _compress(self, own: Projected, cache: LayerCache) -> None:
        """Turn the windows that are now full into entries, and into index keys."""
        if self.compressor is not None:
            assert cache.tail is not None
            entries, cache.tail = self.compressor(
                own["kv"], own["gate"], cache.tail, len(cache.entries)
            )
            cache.entries.append(self.simulate_storage(entries))
        if self.indexer is not None:
            assert cache.index_tail is not None
            keys, cache.index_tail = self.indexer.compressor(
                own["index_kv"], own["index_gate"], cache.index_tail, len(cache.index_keys)
            )
            cache.index_keys.append(self.indexer.simulate_storage(keys))

    def _select(
        self,
        own: Projected,
        cache: LayerCache,
        visible_T: Tensor,
        sequence_idx: int,
        trace: Trace | None,
    ) -> tuple[Selection | None, Tensor | None]:
        """Return the entries to attend to (None: all visible) and, for its loss, their scores."""
        if self.indexer is None:
            return None, None
        if trace is not None and trace.replaying:
            return trace.selections[self.name][sequence_idx], None
        stage = trace.indexer_stage if trace is not None else None
        must_choose = len(cache.index_keys) > self.config.index_topk and stage != "dense"
        selection = scores_TS = None
        if must_choose or stage is not None:
            selection, scores_TS = self.indexer.choose(
                own["index_query"],
                own["index_weight"],
                cache.index_keys,
                visible_T,
                top_k=self.config.index_topk if must_choose else None,
                with_scores=stage is not None,
            )
        if trace is not None:
            trace.selections.setdefault(self.name, []).append(selection)
        return selection, scores_TS

    def simulate_storage(self, kv: Tensor) -> Tensor:
        """Round window keys or entries as `precision` asks."""
        if not self.precision.kv_fp8:
            return kv
        return quant.round_trip_kv_entries(kv, self.config.qk_rope_head_dim)

    def _grouped_projection(self, o_THK: Float[Tensor, "T H K"]) -> Float[Tensor, "T GR"]:
        """Project each group of consecutive heads by its own block of `wo_a` (spec 2.6)."""
        groups = self.num_groups
        scale = self.wo_a.scale
        if not self.wo_a.fakes:
            y = native_product(o_THK.flatten(1), self.wo_a.weight, scale, groups=groups)
            if y is not None:
                return y
        o_TGI = o_THK.flatten(1).unflatten(1, (groups, -1))
        weight_GOI = self.wo_a.dense_weight().to(o_THK.dtype).unflatten(0, (groups, -1))
        return torch.cat([product(o_TGI[:, g], weight_GOI[g]) for g in range(groups)], dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _whole(parts: Sequence[Numbers | None]) -> Numbers | None:
    """Return all numbers in a row; None if some part has none."""
    found = [part for part in parts if part is not None]
    return [number for part in found for number in part] if len(found) == len(parts) else None

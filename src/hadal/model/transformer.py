"""The network: embedding, blocks, collapse, head, and the multi-token-prediction blocks.

Parameters and buffers carry the names of the official checkpoint, so `state_dict()` of a model in
`storage="checkpoint"` is that checkpoint. Reading order: `forward`, then `block.py`, then what it
calls; docs/reading-the-model.md follows the report instead. Shape letters: T tokens, D model dim,
M streams, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hadal.config import LayerKind, ModelConfig
from hadal.errors import InputError
from hadal.model import mhc
from hadal.model.batch import RaggedBatch
from hadal.model.block import Block
from hadal.model.cache import SequenceCache
from hadal.model.decode import one_token_each
from hadal.model.initialize import initialize
from hadal.model.linear import Formats, Linear, Role
from hadal.model.norm import RMSNorm
from hadal.model.precision import Precision
from hadal.model.product import float32_products, product
from hadal.model.sharding import WHOLE, Shard
from hadal.model.trace import Trace

__all__ = ["MTPBlock", "Transformer"]


def _add_collapse(module: nn.Module, config: ModelConfig) -> None:
    for name, shape in mhc.head_shapes(config).items():
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        module.register_parameter(f"hc_head_{name}", parameter)


class MTPBlock(Block):
    """Multi-token prediction: one more block, from the streams and the next token (spec 2.10).

    Always window attention with plain RoPE, even where no main layer has it (spec T6b, T8).
    """

    def __init__(self, config: ModelConfig, idx: int, formats: Formats) -> None:
        super().__init__(config, f"mtp.{idx}", LayerKind.SWA, hashed=False, formats=formats)
        width = config.hidden_size
        self.e_proj = Linear(width, width, Role.DENSE, formats)
        self.h_proj = Linear(width, width, Role.DENSE, formats)
        self.enorm = RMSNorm(width, config.rms_norm_eps, formats.dtype)
        self.hnorm = RMSNorm(width, config.rms_norm_eps, formats.dtype)
        self.norm = RMSNorm(width, config.rms_norm_eps, formats.dtype)
        _add_collapse(self, config)

    def join(
        self, streams_TMD: Float[Tensor, "T M D"], embedded_TD: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T M D"]:
        """Return the block's input: streams of token t beside the embedding of token t + 1."""
        embedded = self.e_proj(self.enorm(embedded_TD)).unsqueeze(1)
        projected = self.h_proj(self.hnorm(streams_TMD).flatten(0, 1))
        return embedded + projected.unflatten(0, streams_TMD.shape[:2])


class Transformer(nn.Module):
    """DeepSeek-V4.

    Args:
        config: Sizes and stored formats.
        storage: `plain` floats, to train or to compute with; or `checkpoint`, the stored formats
            of `config` (FP8, FP4), dequantised at every use.
        dtype: Of activations and of tensors that are neither quantised nor always float32.
        precision: Simulated roundings; by default those of the published model if the config is
            quantised, none otherwise.
        seed: Of the initial weights of a plain model; a stored one starts uninitialised.

    Raises:
        InputError: `storage` is neither.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        storage: Literal["plain", "checkpoint"] = "plain",
        dtype: torch.dtype = torch.float32,
        precision: Precision | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if storage not in ("plain", "checkpoint"):
            raise InputError(f"storage: expected 'plain' or 'checkpoint', got {storage!r}")
        self.config = config
        self.dtype = dtype
        self.storage = storage
        self.precision = precision or Precision.of(config)
        self.shard = WHOLE
        formats = Formats(config=config, storage=storage, dtype=dtype, precision=self.precision)
        self.embed = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size, dtype=dtype),
        )
        self.layers = nn.ModuleList(
            Block(config, f"layers.{i}", kind, hashed=i < config.num_hash_layers, formats=formats)
            for i, kind in enumerate(config.layer_kinds)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, Role.PLAIN, formats)
        _add_collapse(self, config)
        self.mtp = nn.ModuleList(
            MTPBlock(config, i, formats) for i in range(config.num_nextn_predict_layers)
        )
        if storage == "plain" and not self.embed.weight.is_meta:
            initialize(self, seed)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.embed.weight.device

    @property
    def blocks(self) -> list[Block]:
        """Return the main blocks in order."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def mtp_blocks(self) -> list[MTPBlock]:
        """Return the multi-token-prediction blocks in order."""
        return [block for block in self.mtp if isinstance(block, MTPBlock)]

    def divide(self, shard: Shard) -> None:
        """Keep one process's part of the weights; from now on all processes must make the same calls.

        Logits and streams are, bit for bit, those of the whole network. For inference: nothing here
        carries gradients between processes.

        Raises:
            ConfigError: Some count or width cannot be divided among so many.
        """
        width = shard.part(self.config.hidden_size, "columns of the embedding")
        for block in (*self.blocks, *self.mtp_blocks):
            block.attn.divide(shard)
            block.ffn.divide(shard)
        self.head.divide(shard, gathers=False)
        columns = self.embed.weight.detach()[:, width.start : width.stop].clone()
        self.embed.weight = nn.Parameter(columns, requires_grad=False)
        self.shard = shard

    def new_cache(self) -> SequenceCache:
        """Return the state of a sequence without tokens, for `forward`."""
        return self._fresh(self.blocks)

    def new_draft_cache(self, mtp_idx: int = 0) -> SequenceCache:
        """Return the state of a sequence without tokens, for `draft`."""
        return SequenceCache([self.mtp_blocks[mtp_idx].attn.new_cache(self.device, self.dtype)])

    def forward(
        self,
        ids_T: Int[Tensor, " T"],
        lengths: Sequence[int],
        caches: Sequence[SequenceCache] | None = None,
        *,
        trace: Trace | None = None,
    ) -> Float[Tensor, "T V"]:
        """Return float32 logits of every token of a flat ragged batch.

        Args:
            ids_T: The new tokens of all sequences, one sequence after another.
            lengths: How many of them belong to each sequence.
            caches: The past of each sequence, extended by this call, which then records no
                gradients; None for whole sequences. Prefill, chunks of it, decode and mixtures
                differ only in `lengths` and what the caches hold.
            trace: Records the choices of this pass, or makes it repeat those of another.

        Raises:
            InputError: Ids, lengths or caches that do not fit; nothing has been changed then.
            ContextLengthError: A sequence would be longer than the config allows.
        """
        with _recording(caches):
            return self.logits(self.streams(ids_T, lengths, caches, trace=trace))

    def streams(
        self,
        ids_T: Int[Tensor, " T"],
        lengths: Sequence[int],
        caches: Sequence[SequenceCache] | None = None,
        *,
        trace: Trace | None = None,
    ) -> Float[Tensor, "T M D"]:
        """Return the residual streams after the last main block: what `logits` and `draft` take.

        Arguments and errors are those of `forward`.
        """
        state, batch = self._begin(ids_T, lengths, caches, self.blocks, trace)
        with _recording(caches):
            embedded_TD = self.shard.gather(self.embed(ids_T))
            streams_TMD = embedded_TD.unsqueeze(1).expand(-1, self.config.hc_mult, -1)
            return _run(self.blocks, streams_TMD, ids_T, batch, state, trace)

    def logits(self, streams_TMD: Float[Tensor, "T M D"]) -> Float[Tensor, "T V"]:
        """Return the logits of the next token, float32."""
        return self._head(streams_TMD, self, self.norm)

    def draft(
        self,
        streams_TMD: Float[Tensor, "T M D"],
        next_ids_T: Int[Tensor, " T"],
        lengths: Sequence[int],
        caches: Sequence[SequenceCache] | None = None,
        *,
        mtp_idx: int = 0,
        trace: Trace | None = None,
        logits_at: Bool[Tensor, " T"] | None = None,
    ) -> tuple[Float[Tensor, "L V"], Float[Tensor, "T M D"]]:
        """Predict the token after the next one with an MTP block.

        Args:
            streams_TMD: Of tokens t, from `streams`; from the last `draft` to look further ahead.
            next_ids_T: Tokens t + 1.
            lengths: As in `forward`.
            caches: From `new_draft_cache`; their positions are those of tokens t.
            mtp_idx: Which block.
            trace: As in `forward`.
            logits_at: Of which tokens logits are wanted; None for all.

        Returns:
            Logits of tokens t + 2 and the block's own streams.

        Raises:
            InputError: The model has no such block, or as in `forward`.
        """
        if not 0 <= mtp_idx < len(self.mtp):
            raise InputError(f"MTP block {mtp_idx}: the model has {len(self.mtp)}")
        block = self.mtp_blocks[mtp_idx]
        state, batch = self._begin(next_ids_T, lengths, caches, [block], trace)
        expected = (next_ids_T.shape[0], self.config.hc_mult, self.config.hidden_size)
        if tuple(streams_TMD.shape) != expected:
            raise InputError(
                f"draft: expected streams {list(expected)}, got {list(streams_TMD.shape)}"
            )
        with _recording(caches):
            embedded_TD = self.shard.gather(self.embed(next_ids_T))
            joined = block.join(streams_TMD, embedded_TD)
            streams_TMD = _run([block], joined, next_ids_T, batch, state, trace)
            wanted = streams_TMD if logits_at is None else streams_TMD[logits_at]
            return self._head(wanted, block, block.norm), streams_TMD

    def _head(self, streams_TMD: Tensor, owner: nn.Module, norm: RMSNorm) -> Tensor:
        fn, base, scale = (getattr(owner, f"hc_head_{n}") for n in ("fn", "base", "scale"))
        x_TD = norm(mhc.collapse(streams_TMD, fn, base, scale, self.config))
        with float32_products(x_TD.device):
            return self.shard.gather(product(x_TD.float(), self.head.weight))

    def _begin(
        self,
        ids_T: Tensor,
        lengths: Sequence[int],
        caches: Sequence[SequenceCache] | None,
        blocks: Sequence[Block],
        trace: Trace | None,
    ) -> tuple[list[SequenceCache], RaggedBatch]:
        """Check a call; without caches, make fresh ones that end with it."""
        if trace is not None:
            trace.begin([block.attn.name for block in blocks])
        state = [self._fresh(blocks) for _ in lengths] if caches is None else list(caches)
        if len(state) != len(lengths) or len({id(c) for c in state}) != len(state):
            raise InputError(
                f"caches: expected {len(lengths)} different ones, got {len(state)}, of which "
                f"{len({id(c) for c in state})} differ"
            )
        for cache in state:
            if cache.is_taken_by(blocks[0]):
                continue
            fits = len(cache.layers) == len(blocks) and all(
                block.attn.takes(layer, self.dtype)
                for block, layer in zip(blocks, cache.layers, strict=True)
            )
            if not fits:
                raise InputError(
                    f"caches: expected {len(blocks)} layers of this model in {self.dtype}, got "
                    f"{len(cache.layers)} layers in {cache.layers[0].window.dtype}",
                    hint="forward takes model.new_cache(), draft takes model.new_draft_cache()",
                )
        starts, rewindable = [c.num_tokens for c in state], [c.rewindable for c in state]
        return state, RaggedBatch.of(self.config, ids_T, lengths, starts, rewindable)

    def _fresh(self, blocks: Sequence[Block]) -> SequenceCache:
        return SequenceCache([b.attn.new_cache(self.device, self.dtype) for b in blocks])


def _recording(caches: object) -> torch.set_grad_enabled:
    """Return a context that records gradients only where the caller does and no cache is used."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and caches is None)


def _run(
    blocks: Sequence[Block],
    streams_TMD: Tensor,
    ids_T: Tensor,
    batch: RaggedBatch,
    state: list[SequenceCache],
    trace: Trace | None,
) -> Tensor:
    """Run blocks in order; after a failure the caches are as they were before."""
    if trace is None:
        found = one_token_each(blocks, streams_TMD, ids_T, batch, state)
        if found is not None:
            for cache in state:
                cache.advance(1)
            return found
    before = [c.snapshot() for c in state]
    try:
        for idx, block in enumerate(blocks):
            streams_TMD = block(streams_TMD, ids_T, batch, [c.layers[idx] for c in state], trace)
    except BaseException:
        for cache, snapshot in zip(state, before, strict=True):
            cache.restore(snapshot)
        raise
    for cache, snapshot, length in zip(state, before, batch.lengths, strict=True):
        cache.discard(snapshot)
        cache.advance(length)
    return streams_TMD

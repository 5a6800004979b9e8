"""The hybrid cache: blocks of compressed entries, checkpoints of windows, and how the two meet.

A request's state is a chain of blocks (compressed entries; shared) and a slot (windows and tails; its
own). Blocks alone do not restore a sequence: the slot must be brought to the end of the chain, from
the nearest checkpoint before it or, without one, by running the last `window x layers` tokens again
(report 3.5.3). Both read the entries of the chain and write none.
"""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hadal.engine.block_pool import BLOCK_TOKENS, BlockKey, BlockPool, chain_keys
from hadal.engine.completion import PrefixUse
from hadal.engine.disk_store import DiskStore, DiskUse
from hadal.engine.engine_config import EngineConfig
from hadal.engine.paged_cache import BlockStorage, SequenceBlocks
from hadal.engine.team import SOLO, SharedStore, Team
from hadal.model import SequenceCache, Slot, Transformer

__all__ = ["Checkpoint", "HybridCache", "LiveSequence"]

_ALIGN = 64
"""Bytes that tensors begin at a multiple of."""
_BLOCK, _CHECKPOINT = b"B", b"C"
"""Kinds of records on disk."""


@dataclass(frozen=True)
class Checkpoint:
    """The slot of a sequence after a multiple of `BLOCK_TOKENS` tokens.

    Attributes:
        num_tokens: After how many.
        main: Windows and tails of the main layers.
        draft: Of the MTP block, after one token less: it waits for the next token.
        streams: [1, M, D] residual streams of the last token, for the MTP block.
    """

    num_tokens: int
    main: tuple[Slot, ...]
    draft: tuple[Slot, ...] = ()
    streams: Tensor | None = None

    @classmethod
    def of(
        cls, model: Transformer, num_tokens: int, tensors: list[Tensor], *, drafts: bool
    ) -> "Checkpoint":
        """Return the checkpoint that `tensors` gave the tensors of."""
        rest = iter(tensors)
        main = tuple(layer.slot.filled(rest) for layer in model.new_cache().layers)
        if not drafts:
            return cls(num_tokens, main)
        draft = tuple(layer.slot.filled(rest) for layer in model.new_draft_cache().layers)
        return cls(num_tokens, main, draft, next(rest))

    def tensors(self) -> list[Tensor]:
        """Return all tensors in a fixed order."""
        tensors = [t for slot in (*self.main, *self.draft) for t in slot.tensors()]
        return tensors if self.streams is None else [*tensors, self.streams]

    def on_own_memory(self, model: Transformer) -> "Checkpoint":
        """Return the same on pages of its own, outside of the heap.

        Checkpoints live long and lie between tensors that do not: on the heap each kept some MB around
        it from being used again, 1.1 GB in a context of 450,000 tokens (dev/LOG.md).
        """
        tensors = self.tensors()
        if any(t.device.type != "cpu" for t in tensors):
            return self  # other allocators keep such sizes apart
        kept = _on_own_pages(tensors)
        drafts = self.streams is not None
        return Checkpoint.of(model, self.num_tokens, kept, drafts=drafts)

    @property
    def num_bytes(self) -> int:
        """Return what it occupies."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _on_own_pages(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors into one mapping, which goes with the last of them."""
    sizes = [-(-t.numel() * t.element_size() // _ALIGN) * _ALIGN for t in tensors]
    pages = mmap.mmap(-1, max(sum(sizes), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    places = torch.frombuffer(pages, dtype=torch.uint8)[: sum(sizes)].split(sizes)
    kept: list[Tensor] = []
    for tensor, place in zip(tensors, places, strict=True):
        num_bytes = tensor.numel() * tensor.element_size()
        kept.append(place[:num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return kept


@dataclass
class LiveSequence:
    """The state of one request that is being worked on.

    Attributes:
        main: Cache of the main layers.
        blocks: The blocks behind it.
        keys: Names of the blocks that have been sealed.
        draft: Cache of the MTP block, if tokens are drafted.
        streams: [R, M, D] of the last tokens, which the MTP block has not taken yet.
        end_key: Block with this sequence's latest checkpoint that is due to no interval.
    """

    main: SequenceCache
    blocks: SequenceBlocks
    keys: list[BlockKey]
    draft: SequenceCache | None = None
    streams: Tensor | None = None
    end_key: BlockKey | None = None

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have been computed."""
        return self.main.num_tokens


class HybridCache:
    """Blocks, checkpoints and their reuse.

    Args:
        model: Whose state it is.
        config: Of the engine.
        storage: Content of the blocks.
        root: Names the model, its weights and the stored format.
        team: Processes with the same cache; the first one's folder on disk serves all.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        storage: BlockStorage,
        root: BlockKey,
        team: Team = SOLO,
    ) -> None:
        self._model = model
        self._config = config
        self._storage = storage
        self._root = root
        self.pool = BlockPool(storage.num_blocks)
        self._disk = None
        if config.disk_path is not None:
            store = DiskStore(config.disk_path, config.disk_bytes) if team.leads else None
            self._disk = SharedStore(store, team)
        self._checkpoints: OrderedDict[BlockKey, Checkpoint] = OrderedDict()
        self._passing: set[BlockKey] = set()
        """Checkpoints that a live sequence replaces by its next one."""
        self.checkpoint_bytes = 0
        self._drafts = config.num_speculative_tokens > 0
        layers = len(model.blocks) + (1 if self._drafts else 0)
        self.recompute_tokens = (
            -(-model.config.sliding_window * layers // BLOCK_TOKENS) * BLOCK_TOKENS
        )
        """Tokens to run again where there is no checkpoint: then every window is exact."""

    def open(self, ids: Sequence[int], *, reuse: bool = True) -> tuple[LiveSequence, PrefixUse]:
        """Start a sequence from as much of its prefix as is known.

        The last token is always left to run: its logits are what the request is about.

        Returns:
            The sequence, and where its state comes from (`computed` is all the rest).
        """
        reuse = reuse and self._config.prefix_caching
        keys = chain_keys(self._root, ids[:-1]) if reuse else []
        chain = self.pool.chain(keys)
        for block in chain:
            self.pool.hold(block)
        in_memory = len(chain)
        chain += self._read_blocks(keys[in_memory:])
        keys = keys[: len(chain)]
        end = len(chain) * BLOCK_TOKENS
        start, checkpoint = self._start(keys)
        blocks = SequenceBlocks(self._model.device, chain, len(chain))
        sequence = LiveSequence(self._storage.new_sequence(blocks, start), blocks, keys)
        self._load(sequence, checkpoint, start)
        read = (len(chain) - in_memory) * BLOCK_TOKENS
        use = PrefixUse(hit=start, replayed=end - start, computed=len(ids) - end, from_disk=read)
        return sequence, replace(use, reason=self._reason(ids, len(chain), reuse=reuse))

    def _start(self, keys: list[BlockKey]) -> tuple[int, Checkpoint | None]:
        """Return where to start for the least work before the end of a chain of blocks."""
        end = len(keys) * BLOCK_TOKENS
        cold = max(end - self.recompute_tokens, 0)
        for idx in range(len(keys), 0, -1):
            if idx * BLOCK_TOKENS < cold:
                break
            checkpoint = self._find_checkpoint(keys[idx - 1], idx * BLOCK_TOKENS)
            if checkpoint is not None:
                return checkpoint.num_tokens, checkpoint
        return cold, None

    def _find_checkpoint(self, key: BlockKey, num_tokens: int) -> Checkpoint | None:
        checkpoint = self._checkpoints.get(key)
        if checkpoint is not None:
            self._checkpoints.move_to_end(key)
        elif self._disk is not None:
            tensors = self._disk.get(_CHECKPOINT, key)
            if tensors is not None:
                placed = [t.to(self._model.device) for t in tensors]
                checkpoint = Checkpoint.of(self._model, num_tokens, placed, drafts=self._drafts)
                self._remember(key, checkpoint)
        return checkpoint

    def _read_blocks(self, keys: Sequence[BlockKey]) -> list[int]:
        """Bring blocks in from disk, as far as the chain goes and there is room; hold them."""
        blocks: list[int] = []
        for key in keys if self._disk is not None else ():
            assert self._disk is not None
            known = self.pool.find(key)
            if known is not None:
                self.pool.hold(known)
                blocks.append(known)
                continue
            rows = self._disk.get(_BLOCK, key) if self.pool.use().available else None
            if rows is None:
                break
            block = self.pool.take()
            self._storage.write_block(block, rows)
            blocks.append(self.pool.seal(block, key))
        return blocks

    def _load(self, sequence: LiveSequence, checkpoint: Checkpoint | None, start: int) -> None:
        if self._drafts:
            sequence.draft = self._model.new_draft_cache()
            sequence.draft.num_tokens = start
        if checkpoint is None:
            return
        sequence.main.load_slots(checkpoint.main, start)
        if sequence.draft is not None:
            sequence.draft.load_slots(checkpoint.draft, start - 1)
            sequence.streams = checkpoint.streams

    def _reason(self, ids: Sequence[int], num_blocks: int, *, reuse: bool) -> str:
        end = num_blocks * BLOCK_TOKENS
        if not reuse:
            return "prefix reuse is off for this request"
        if len(ids) <= BLOCK_TOKENS:
            return f"a prompt up to {BLOCK_TOKENS} tokens has no block that could be reused"
        if len(ids) - 1 - end < BLOCK_TOKENS:
            return "all full blocks were reused"
        return f"no block is known for tokens {end} to {end + BLOCK_TOKENS}"

    def blocks_missing(self, sequence: LiveSequence, num_tokens: int) -> int:
        """Return how many blocks a sequence needs to grow to so many tokens."""
        return max(-(-num_tokens // BLOCK_TOKENS) - len(sequence.blocks.ids), 0)

    def blocks_to_open(self, ids: Sequence[int]) -> int:
        """Return how many blocks that nobody holds now it would take to run these tokens."""
        chain = self.pool.chain(chain_keys(self._root, ids[:-1]))
        shared = sum(self.pool.is_held(block) for block in chain)
        return -(-(len(ids) + 1) // BLOCK_TOKENS) - shared

    def reserve(self, sequence: LiveSequence, num_tokens: int) -> None:
        """Take the blocks that a sequence needs to grow to so many tokens."""
        for _ in range(self.blocks_missing(sequence, num_tokens)):
            sequence.blocks.ids.append(self.pool.take())

    def seal(self, sequence: LiveSequence, ids: Sequence[int]) -> None:
        """Name and share the blocks that are full of tokens which will not be taken back."""
        done = sequence.blocks.num_sealed
        full = sequence.num_tokens // BLOCK_TOKENS
        if full <= done or not self._config.prefix_caching:
            return
        root = sequence.keys[-1] if sequence.keys else self._root
        keys = chain_keys(root, ids[: full * BLOCK_TOKENS], after=done * BLOCK_TOKENS)
        for idx, key in enumerate(keys, start=done):
            block = self.pool.seal(sequence.blocks.ids[idx], key)
            sequence.blocks.replace(idx, block)
            if self._disk is not None:
                self._disk.put(_BLOCK, key, self._storage.read_block(block))
        sequence.keys += keys
        sequence.blocks.num_sealed = full

    def due(self, sequence: LiveSequence, start: int, end: int, prompt_tokens: int) -> list[int]:
        """Return where within a call from `start` to `end` checkpoints are to be taken.

        At every multiple of the interval; at the last one that a resent prompt can use; and, so that an
        answer can be continued, at the last one of the call, which replaces the one before it.
        """
        policy, step = self._config.window_policy, self._config.checkpoint_interval
        if policy == "none" or not self._config.prefix_caching:
            return []
        first = start // BLOCK_TOKENS + 1
        multiples = [b * BLOCK_TOKENS for b in range(first, end // BLOCK_TOKENS + 1)]
        if policy == "all" or not multiples:
            return multiples
        prompt_end = (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        wanted = {m for m in multiples if m % step == 0 or m == prompt_end}
        return sorted(wanted | {multiples[-1]})

    def keep(self, sequence: LiveSequence, checkpoint: Checkpoint, prompt_tokens: int) -> None:
        """Remember a checkpoint of a sequence whose blocks up to there are sealed."""
        key = sequence.keys[checkpoint.num_tokens // BLOCK_TOKENS - 1]
        if sequence.end_key is not None and sequence.end_key in self._passing:
            self._drop(sequence.end_key)
        sequence.end_key = None
        if not self._is_passing(checkpoint.num_tokens, prompt_tokens):
            self._drop(key)
        elif key not in self._checkpoints:
            self._passing.add(key)
            sequence.end_key = key
        if key not in self._checkpoints:
            self._remember(key, checkpoint)
        if self._disk is not None and key not in self._passing:
            self._disk.put(_CHECKPOINT, key, checkpoint.tensors())

    def _remember(self, key: BlockKey, checkpoint: Checkpoint) -> None:
        checkpoint = checkpoint.on_own_memory(self._model)
        self._checkpoints[key] = checkpoint
        self.checkpoint_bytes += checkpoint.num_bytes
        while self.checkpoint_bytes > self._config.checkpoint_bytes and self._checkpoints:
            self._drop(next(iter(self._checkpoints)))

    def _is_passing(self, num_tokens: int, prompt_tokens: int) -> bool:
        """Return whether a checkpoint stands only until the sequence has a later one."""
        prompt_end = (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        on_interval = num_tokens % self._config.checkpoint_interval == 0
        return (
            self._config.window_policy == "periodic"
            and not on_interval
            and num_tokens != prompt_end
        )

    def _drop(self, key: BlockKey) -> None:
        checkpoint = self._checkpoints.pop(key, None)
        self._passing.discard(key)
        if checkpoint is not None:
            self.checkpoint_bytes -= checkpoint.num_bytes

    def close(self, sequence: LiveSequence) -> None:
        """Let go of everything a sequence holds. Sealed blocks stay until their room is needed."""
        self.pool.release(sequence.blocks.ids)
        sequence.blocks.ids.clear()
        if sequence.end_key is not None:
            self._passing.discard(sequence.end_key)  # the end of a turn: now it stays
            last = self._checkpoints.get(sequence.end_key)
            if self._disk is not None and last is not None:
                self._disk.put(_CHECKPOINT, sequence.end_key, last.tensors())

    def clear(self) -> None:
        """Forget every prefix that no live sequence uses, and all checkpoints."""
        self.pool.clear()
        self._checkpoints.clear()
        self._passing.clear()
        self.checkpoint_bytes = 0

    def shut_down(self) -> None:
        """Let go of the folder on disk."""
        if self._disk is not None:
            self._disk.close()

    def disk_use(self) -> DiskUse | None:
        """Return the state of the folder on disk; None without one."""
        return self._disk.use() if self._disk is not None else None

    @property
    def num_checkpoints(self) -> int:
        """Return how many checkpoints are kept in memory."""
        return len(self._checkpoints)

"""Numbers of cache blocks: who holds them, what they contain, which goes first (decision 4).

A block is the compressed state of `BLOCK_TOKENS` tokens in all layers: 32 CSA entries, 32 index keys,
1 HCA entry (report 3.5: the least common multiple of the two rates). While one sequence fills it, it
is that sequence's own. Once full it is sealed: named by the chain of all tokens up to its end, never
written again, and shared by whoever holds the same tokens. A sealed block that nobody holds stays, and
is the first to go, least recently used first, when room is needed.

No tensors here: `paged_cache.py` keeps what the blocks contain.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

from hadal.errors import EngineError

__all__ = ["BLOCK_TOKENS", "BlockKey", "BlockPool", "PoolUse", "chain_keys"]

BLOCK_TOKENS = 128

BlockKey = bytes
"""Digest of the model, the stored format and every token up to the end of a block."""


def chain_keys(root: BlockKey, ids: Sequence[int], *, after: int = 0) -> list[BlockKey]:
    """Return the keys of the full blocks of `ids`.

    Args:
        root: Names model and format for a sequence's first block; or the key that comes before.
        ids: Token ids.
        after: Tokens of `ids` that `root` already covers.
    """
    keys: list[BlockKey] = []
    bounds = range(after, len(ids) + 1, BLOCK_TOKENS)
    for start, end in pairwise(bounds):
        digest = blake2b(root, digest_size=16)
        digest.update(b"".join(i.to_bytes(4, "little") for i in ids[start:end]))
        root = digest.digest()
        keys.append(root)
    return keys


@dataclass(frozen=True)
class PoolUse:
    """Blocks of a pool by state; they add up to `total`."""

    total: int
    held: int
    cached: int
    """Sealed and held by nobody: reusable, and free to be taken."""
    empty: int

    @property
    def available(self) -> int:
        """Return how many could be taken now."""
        return self.cached + self.empty


class BlockPool:
    """A fixed number of blocks, counted by who holds them."""

    def __init__(self, num_blocks: int) -> None:
        self._empty = deque(range(num_blocks))
        self._holders = [0] * num_blocks
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        self._block_of: dict[BlockKey, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Sealed blocks without holder, the next to be evicted first."""
        self.num_evictions = 0

    def use(self) -> PoolUse:
        """Return how the blocks are used."""
        total, empty, cached = len(self._holders), len(self._empty), len(self._cached)
        return PoolUse(total, total - empty - cached, cached, empty)

    def find(self, key: BlockKey) -> int | None:
        """Return the sealed block of this content, if there is one."""
        return self._block_of.get(key)

    def chain(self, keys: Iterable[BlockKey]) -> list[int]:
        """Return the longest run of blocks from the first key on."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(self) -> int:
        """Return an empty block, held once; evicts a cached one if there is no other.

        Raises:
            EngineError: All are held.
        """
        if self._empty:
            block = self._empty.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.num_evictions += 1
        else:
            raise EngineError(
                f"the cache has no block left: all {len(self._holders)} are held",
                hint="this is a fault of the scheduler, which counts blocks before a step",
            )
        self._holders[block] = 1
        return block

    def is_held(self, block: int) -> bool:
        """Return whether some sequence uses a block."""
        return self._holders[block] > 0

    def hold(self, block: int) -> None:
        """Hold a sealed block once more."""
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks; its last ones become the first to be evicted."""
        for block in reversed(blocks):
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._key_of[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def seal(self, block: int, key: BlockKey) -> int:
        """Name a full block; return the block to use from now on.

        If another sequence has sealed the same content before, that one is held instead and ours is
        emptied.
        """
        known = self._block_of.get(key)
        if known is not None and known != block:
            self.hold(known)
            self.release([block])
            return known
        self._key_of[block] = key
        self._block_of[key] = block
        return block

    def key_of(self, block: int) -> BlockKey | None:
        """Return the name of a sealed block."""
        return self._key_of[block]

    def clear(self) -> int:
        """Forget every sealed block that nobody holds; return how many."""
        count = len(self._cached)
        for block in self._cached:
            self._forget(block)
            self._empty.append(block)
        self._cached.clear()
        return count

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None

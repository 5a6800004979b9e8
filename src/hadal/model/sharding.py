"""One network over several processes: each keeps a part of the weights, all get the same bits.

Heads, output groups, the columns of dense matrices, the vocabulary and whole experts are divided. No
sum is ever cut into parts: every output element is computed by one process over its whole length and
then gathered, since partial sums would round otherwise, and near-ties of the indexer and the router
flip on the last bit (dev/LOG.md). What is shared by all heads (the one key of each token, compressors,
index keys, and so every cache) and what is small (norms, mHC, gates) is kept by every process.

Shape letters: T tokens, O outputs, D model dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from hadal.errors import ConfigError

__all__ = ["WHOLE", "Shard", "take_rows"]

_LOOK_EVERY = timedelta(seconds=2)


def _taken_to_be() -> bool:
    """Answer for processes that nobody watches; a function of the module, since a network is pickled with it."""
    return True


@dataclass(frozen=True)
class Shard:
    """A process's part of a network.

    Attributes:
        rank: Which part, from 0.
        size: How many parts there are; the processes of this job hold them.
        alive: Whether the others are, as far as this one can see.
    """

    rank: int = 0
    size: int = 1
    alive: Callable[[], bool] = field(default=_taken_to_be, compare=False)

    def part(self, count: int, what: str) -> range:
        """Return which of `count` things this process keeps.

        Raises:
            ConfigError: They cannot be divided evenly.
        """
        if count % self.size:
            raise ConfigError(
                f"{count} {what} cannot be divided among {self.size} processes",
                hint="choose a tensor_parallel_size that divides heads, output groups, experts, "
                "vocabulary and widths",
            )
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def gather(self, own: Float[Tensor, "T O"]) -> Float[Tensor, "T N"]:
        """Return the columns of all processes, in order of rank."""
        if self.size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self.finish(dist.all_gather(parts, own.contiguous(), async_op=True))
        return torch.cat(parts, dim=-1)

    def combine(self, own: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the sum over processes of a tensor that all but one have zeros in, so it is exact."""
        if self.size > 1:
            self.finish(dist.all_reduce(own, async_op=True))
        return own

    def finish(self, work: dist.Work | None) -> None:
        """Wait for all processes to have done something together.

        gloo mostly says that a process has died, and sometimes waits for it (dev/LOG.md): so this looks, too.

        Raises:
            RuntimeError: Another process is gone.
        """
        while work is not None:
            try:
                work.wait(_LOOK_EVERY) if dist.get_backend() == "gloo" else work.wait()
                return
            except RuntimeError:
                if work.is_completed() or not self.alive():
                    raise


WHOLE = Shard()
"""The only part of a network in one process."""


def take_rows(module: nn.Module, name: str, rows: range, *, tile: int = 1) -> None:
    """Keep some rows of a parameter, on memory of its own.

    Args:
        module: Whose parameter.
        name: Its name.
        rows: Which rows, counted in those of the whole matrix.
        tile: Rows of the matrix that share one row of this parameter (FP8 scales).

    Raises:
        ConfigError: The cut goes through a tile.
    """
    if rows.start % tile or rows.stop % tile:
        raise ConfigError(
            f"{name}: rows {rows.start} to {rows.stop} do not end at a multiple of {tile}, where "
            "FP8 blocks end",
            hint="use fewer processes",
        )
    old = getattr(module, name)
    kept = old.detach()[rows.start // tile : rows.stop // tile].clone()
    setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))

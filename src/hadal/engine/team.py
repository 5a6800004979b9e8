"""Processes that run one engine together: the first decides, all compute.

Every process has an engine of its own over its part of the weights (`hadal.model.sharding`), and all of
them take the same steps: scheduler and cache depend on token counts only, so the same requests in the
same order make the same plans. What must not be computed twice is told by the first process: which
requests came and went, which tokens were chosen, what was read from disk. Messages between processes
are JSON and safetensors; nothing is unpickled.
"""

import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from hadal.engine.block_pool import BlockKey
from hadal.engine.disk_store import DiskStore, DiskUse
from hadal.errors import ConfigError, EngineError
from hadal.model import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SOLO", "SharedStore", "Team", "dismiss", "join_team"]

_GRACE_S = 10
_FOR_EVER = timedelta(days=365)
"""An idle engine waits for its next request; that a process has died is seen otherwise."""


@dataclass(frozen=True)
class Team:
    """Whom a process runs with.

    Attributes:
        shard: Its part of the network.
        control: Group for messages, on the CPU; None for a single process.
        started: The others, where this process started them.
    """

    shard: Shard
    control: "ProcessGroup | None" = None
    started: "tuple[subprocess.Popen[bytes], ...]" = ()

    @property
    def leads(self) -> bool:
        """Return whether this process decides."""
        return self.shard.rank == 0

    def share(self, value: Any) -> Any:
        """Return the first process's value, which must be JSON.

        Raises:
            EngineError: Another process of the team is gone.
        """
        if self.shard.size == 1:
            return value
        return json.loads(self.share_bytes(json.dumps(value).encode() if self.leads else b""))

    def share_bytes(self, data: bytes) -> bytes:
        """Return the first process's bytes.

        Raises:
            EngineError: Another process of the team is gone.
        """
        if self.shard.size == 1:
            return data
        size = torch.tensor([len(data)])
        try:
            self.shard.finish(dist.broadcast(size, 0, group=self.control, async_op=True))
            told = torch.empty(int(size), dtype=torch.uint8)
            if self.leads:
                told = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else told
            if told.shape[0]:
                self.shard.finish(dist.broadcast(told, 0, group=self.control, async_op=True))
        except RuntimeError as err:
            raise EngineError(
                f"process {self.shard.rank} of {self.shard.size} lost the others: {err}",
                hint="start the engine again; its cache on disk is kept",
            ) from err
        return told.numpy().tobytes()

    def least(self, value: int) -> int:
        """Return the smallest of all processes' values."""
        if self.shard.size == 1:
            return value
        found = torch.tensor([value])
        work = dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.control, async_op=True)
        self.shard.finish(work)
        return int(found)

    def leave(self) -> None:
        """Part from the others; those that this process started end."""
        if self.shard.size > 1 and dist.is_initialized():
            # It waits for what is under way, which does not end where a process is gone.
            parting = threading.Thread(target=dist.destroy_process_group, daemon=True)
            parting.start()
            parting.join(_GRACE_S)
        dismiss(self.started)


def dismiss(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Let processes end: they do when their standard input closes."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


SOLO = Team(Shard())
"""The team of an engine in one process."""


def join_team(
    rank: int, size: int, meeting_point: str, device: torch.device, alive: Callable[[], bool]
) -> Team:
    """Find the other processes; returns when all are there.

    Args:
        rank: Of this process.
        size: How many there are.
        meeting_point: As `torch.distributed.init_process_group` takes `init_method`.
        device: Where this process computes.
        alive: Whether the others are, as far as this one can see.

    Raises:
        ConfigError: This process is in a team already.
    """
    if dist.is_initialized():
        raise ConfigError(
            "this process has a divided engine already",
            hint="close it first: a process can be part of one at a time",
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=meeting_point, rank=rank, world_size=size, timeout=_FOR_EVER
    )
    control = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    assert isinstance(control, dist.ProcessGroup)
    return Team(Shard(rank, size, alive), control)


class SharedStore:
    """A folder of blocks and checkpoints that one process reads and writes for its team.

    Args:
        store: The folder, in the first process; None in the others.
        team: Who is told what was read.
    """

    def __init__(self, store: DiskStore | None, team: Team) -> None:
        self._store = store
        self._team = team

    def get(self, kind: bytes, key: BlockKey) -> list[Tensor] | None:
        """Return a record's tensors, as `DiskStore.get`, in every process the same."""
        found = self._store.get(kind, key) if self._store is not None else None
        if self._team.shard.size == 1:
            return found
        told = self._team.share_bytes(_packed(found) if found is not None else b"")
        return _unpacked(told) if told else None

    def put(self, kind: bytes, key: BlockKey, tensors: list[Tensor]) -> None:
        """Append a record, as `DiskStore.put`."""
        if self._store is not None:
            self._store.put(kind, key, tensors)

    def use(self) -> DiskUse | None:
        """Return the state of the folder; None in a process that does not have it."""
        return self._store.use() if self._store is not None else None

    def close(self) -> None:
        """Let another process use the folder."""
        if self._store is not None:
            self._store.close()


def _packed(tensors: Sequence[Tensor]) -> bytes:
    return safetensors.torch.save({str(i): t.contiguous() for i, t in enumerate(tensors)})


def _unpacked(data: bytes) -> list[Tensor]:
    named = safetensors.torch.load(data)
    return [named[str(i)] for i in range(len(named))]

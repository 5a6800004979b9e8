"""From a checkpoint to an engine, in this process or divided among several on this machine."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hadal.checkpoint import load
from hadal.engine.engine import Engine
from hadal.engine.engine_config import EngineConfig
from hadal.engine.stepper import TokenBytes
from hadal.engine.team import Team, dismiss, join_team
from hadal.errors import ConfigError
from hadal.model import Transformer

__all__ = ["follow", "open_engine"]


def open_engine(
    path: str | Path,
    config: EngineConfig | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    token_bytes: TokenBytes | None = None,
) -> Engine:
    """Load a checkpoint and make its engine; start the other processes if it is to be divided.

    The other processes end with this one, or when the engine is closed.

    Args:
        path: Folder of the checkpoint.
        config: How to serve; `tensor_parallel_size` says how many processes.
        device: As torch names it; of a `cuda` device, process i takes number i.
        dtype: Of activations, as torch names it; None for what the checkpoint has.
        token_bytes: Exact bytes of a token id, for stop texts.

    Raises:
        ConfigError, CheckpointError: As `Engine` and `hadal.checkpoint.load`; or the model cannot be
            divided among so many.
    """
    config = config or EngineConfig()
    size = config.tensor_parallel_size
    if size == 1:
        model = load(path, device=device_of(device, 0, 1), dtype=dtype_of(dtype))
        return Engine(model, config, token_bytes=token_bytes)
    order = {
        "path": str(path),
        "config": asdict(replace(config, disk_path=None, step_log=None)),
        "on_disk": config.disk_path is not None,
        "device": device,
        "dtype": dtype,
    }
    with tempfile.TemporaryDirectory(prefix="hadal-team-") as folder:
        order |= {"meeting_point": f"file://{folder}/meeting-point", "size": size}
        others = [_start(order | {"rank": rank}) for rank in range(1, size)]
        try:
            model, team = _take_part(
                order | {"rank": 0}, lambda: all(process.poll() is None for process in others)
            )
            team = replace(team, started=tuple(others))
            return Engine(model, config, token_bytes=token_bytes, team=team)
        except BaseException:
            for process in others:
                process.kill()
            dismiss(others)
            raise


def follow(order: dict[str, Any]) -> None:
    """Be one of the other processes of an engine, until the first one ends."""
    model, team = _take_part(order, lambda: True)  # it ends with the first one: worker.py
    # Where blocks are stored is the first process's affair; that they are is part of the plan.
    folder = Path("of the first process") if order["on_disk"] else None
    Engine(model, EngineConfig(**order["config"] | {"disk_path": folder}), team=team).follow()
    team.leave()


def _start(order: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """Start a process that follows; the pipe to it closes, and it ends, when this one does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hadal.engine.worker"],
        stdin=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    return process


def _take_part(order: dict[str, Any], alive: Callable[[], bool]) -> tuple[Transformer, Team]:
    """Meet the others, and load this process's part of the model."""
    rank, size = order["rank"], order["size"]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = device_of(order["device"], rank, size)
    if device.type == "cpu":  # more threads than cores would spin against each other
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    team = join_team(rank, size, order["meeting_point"], device, alive)
    try:
        model = load(order["path"], dtype=dtype_of(order["dtype"]))
        model.divide(team.shard)
    except BaseException:
        team.leave()
        raise
    return model.to(device), team


def device_of(name: str, rank: int, size: int) -> torch.device:
    """Return the device of one process.

    Raises:
        ConfigError: There is no such device.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and size > 1:
            device = torch.device("cuda", rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).splitlines()[0]
        raise ConfigError(f"device {name}: process {rank} cannot compute there: {reason}") from err
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return a dtype by its name.

    Raises:
        ConfigError: It is none that a model can compute in.
    """
    if name is None:
        return None
    found = getattr(torch, name, None)
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype: expected float32, bfloat16 or float16, got {name!r}")
    return found

"""QEMU as a hypervisor: its monitor, its guest's port, and the memory that it maps."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

from hadal.errors import NodeError
from hadal.node.cgroups import Cgroup
from hadal.node.guest import Guest, GuestLostError
from hadal.node.machines.jail_files import socket_path
from hadal.node.machines.machine import Machine, start_machine
from hadal.node.machines.memory import copy_memory, empty_memory, memory_of, save_memory
from hadal.node.machines.monitor import Monitor
from hadal.node.machines.plan import Plan, Start
from hadal.node.machines.qemu import qemu_call
from hadal.node.machines.serial_console import SerialConsole
from hadal.node.machines.snapshots import Snapshot
from hadal.node.network import BoxNetwork

__all__ = ["Qemu"]

_SOCKET, _PORT, _CONSOLE = "qmp", "port", "console"
_ANSWER_S = 10.0
_BOOT_S = 60.0
_BOOT_OF_A_SYSTEM_S = 600.0
"""With all that it does when it boots first, emulated."""


class Qemu:
    """See the module.

    Args:
        has_guest: Whether its machines will have our guest program.
    """

    chains = True
    """Whether disks may stand on others."""

    def __init__(self, *, has_guest: bool = True) -> None:
        self._has_guest = has_guest

    @contextlib.contextmanager
    def jailed(
        self, plan: Plan, network: BoxNetwork, snapshot: Snapshot | None
    ) -> Generator[dict[str, Any]]:
        """Yield what the jail of a machine has for it: fields of a launch request."""
        memory = -1 if snapshot is not None else empty_memory(plan.hardware.memory_mb << 20)
        keep = (memory if snapshot is None else snapshot.memory,)
        if network.tap is not None:
            keep = (*keep, network.tap)
        try:
            yield {"keep": keep, "devices": ("kvm",) if plan.hardware.accelerator == "kvm" else ()}
        finally:
            if memory >= 0:
                os.close(memory)

    async def start(self, jail: Guest, start: Start) -> tuple[Machine, Guest]:
        """As the protocol's."""
        folder, plan, snapshot = start.folder, start.plan, start.snapshot

        async def begin() -> tuple[Monitor, Guest]:
            monitor = await Monitor.connect(folder / _SOCKET)
            try:
                if snapshot is not None:
                    await monitor.load_devices(snapshot.devices)
                    start.note()
                if not self._has_guest:
                    console = await SerialConsole.reach(folder / _CONSOLE)
                    await monitor.go_on()
                    return monitor, console
                if snapshot is not None:
                    await monitor.go_on()
                if start.guest is not None:
                    await start.guest.renew(lambda: self.reach(folder))
                    return monitor, start.guest
                return monitor, await _guest_of(
                    folder, _BOOT_S if plan.layers else _BOOT_OF_A_SYSTEM_S
                )
            except BaseException:
                await monitor.close()
                raise

        call = qemu_call(
            plan.program, plan.hardware, plan.options, below=start.below, waits=snapshot is not None,
            shares=snapshot is not None and not snapshot.own,
        )  # fmt: skip
        return await start_machine(jail, folder, call, _SOCKET, begin)

    async def find(self, folder: Path) -> tuple[Monitor, Guest]:
        """As the protocol's."""
        monitor = await Monitor.connect(folder / _SOCKET)
        try:
            await monitor.go_on()  # where a daemon died while it stood still
            if not self._has_guest:
                return monitor, await SerialConsole.reach(folder / _CONSOLE)
            return monitor, await _guest_of(folder, _ANSWER_S)
        except BaseException:
            await monitor.close()
            raise

    async def reach(self, folder: Path) -> socket.socket:
        """As the protocol's."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            with socket_path(folder / _PORT) as path:
                await asyncio.get_running_loop().sock_connect(connection, path)
            return connection
        except OSError as error:
            connection.close()
            raise GuestLostError(f"no port of a machine in {folder}: {error.strerror}") from error

    def save_memory(self, folder: Path, target: int, cgroup: Cgroup, init: int) -> None:
        """As the protocol's."""
        pid = _qemu_of(cgroup, init)
        base = memory_of(pid)
        try:
            save_memory(pid, base, target)
        finally:
            os.close(base)

    def memory(self, folder: Path, size: int, cgroup: Cgroup, init: int) -> int:
        """As the protocol's."""
        pid = _qemu_of(cgroup, init)
        base = memory_of(pid)
        try:
            return copy_memory(pid, base)
        finally:
            os.close(base)


async def _guest_of(folder: Path, timeout_s: float) -> Guest:
    """Connect to the guest of a machine."""
    try:
        with socket_path(folder / _PORT) as path:
            return await Guest.connect(Path(path), timeout_s=timeout_s, port=True)
    except FileNotFoundError as error:
        raise GuestLostError(f"no port of a machine in {folder}") from error


def _qemu_of(cgroup: Cgroup, init: int) -> int:
    """Return the process of a machine.

    Raises:
        NodeError: There is none, or more than one: it is not what it was.
    """
    others = set(cgroup.processes()) - {init}
    if len(others) != 1:
        raise NodeError(f"{len(others)} processes where a machine has one")
    return others.pop()

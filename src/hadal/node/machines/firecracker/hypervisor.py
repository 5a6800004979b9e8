"""Firecracker as a hypervisor: how a microVM is configured, booted, restored, and reached."""

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

from hadal.errors import NodeError, UnsupportedError
from hadal.node.box_networks import BoxNetworks
from hadal.node.cgroups import Cgroup
from hadal.node.guest import Guest
from hadal.node.machines.firecracker.monitor import FirecrackerMonitor
from hadal.node.machines.firecracker.vsock import PORT, connect_vsock
from hadal.node.machines.jail_files import open_file
from hadal.node.machines.machine import USER, Machine, start_machine
from hadal.node.machines.memory import DESCRIPTOR, memory_from
from hadal.node.machines.plan import Plan, Start
from hadal.node.machines.qemu import BOOT, FOLDER, LAYERS
from hadal.node.machines.snapshots import Snapshot
from hadal.node.network import LENT_TAP, BoxNetwork
from hadal.node.sparse import copy_not_zero

__all__ = ["MODULES", "Firecracker", "configuration", "firecracker_program", "restoration"]

MODULES = ("vmw_vsock_virtio_transport",)
"""Of the kernel, beside those of other machines."""
_SOCKET = "api"
_ANSWER_S = 10.0
_BOOT_S = 60.0
_REQUEST_S = 120.0
_DEVICES_MAX = 19
"""Interrupts that there are for devices without PCI."""
_DEVICES = 5
"""Beside the layers: the disk, the network, the socket, the balloon and the random numbers."""

_Requests = list[tuple[str, dict[str, Any]]]


def firecracker_program() -> str:
    """Return the path of Firecracker, which the jail has at the same place.

    Raises:
        UnsupportedError: It is not installed, or not where jails see it.
    """
    found = shutil.which("firecracker")
    if found is None or not found.startswith("/usr/"):
        raise UnsupportedError(
            f"no firecracker in /usr: {found or 'not installed'}",
            hint="github.com/firecracker-microvm/firecracker/releases, into /usr/local/bin; or let the node use QEMU",
        )
    return found


def configuration(plan: Plan) -> _Requests:
    """Return what is told a Firecracker that is to boot, in order: paths and bodies of PUT.

    Raises:
        UnsupportedError: It has more layers than there are interrupts for.
    """
    hardware = plan.hardware
    if hardware.layers + _DEVICES > _DEVICES_MAX:
        raise UnsupportedError(
            f"an image of {hardware.layers} layers: with Firecracker at most {_DEVICES_MAX - _DEVICES}",
            hint="build it with fewer layers, or let the node use QEMU",
        )
    # A machine ends by a reset of its keyboard controller; what else it looks for there is not.
    line = (
        "console=ttyS0 quiet reboot=k panic=-1 tsc=nowatchdog i8042.noaux i8042.nomux i8042.dumbkbd"
    )
    options = plan.options | {"vsock": PORT, "ordered": 1}
    line += "".join(f" hadal_{name}={value}" for name, value in options.items())
    source = {
        "kernel_image_path": f"{BOOT}/kernel",
        "initrd_path": f"{BOOT}/initrd",
        "boot_args": line,
    }
    network = {"iface_id": "eth0", "host_dev_name": LENT_TAP}
    return [
        ("/machine-config", {"vcpu_count": hardware.cpus, "mem_size_mib": hardware.memory_mb}),
        ("/boot-source", source),
        # In the order in which the guest counts them.
        *(_drive(f"layer{n}", f"{LAYERS}/{n}", read_only=True) for n in range(hardware.layers)),
        _drive("scratch", f"{FOLDER}/disk", read_only=False),
        *([("/network-interfaces/eth0", network)] if hardware.network else []),
        ("/vsock", {"guest_cid": 3, "uds_path": f"{FOLDER}/vsock"}),
        ("/entropy", {}),
        # What the guest does not need goes back to the host by itself.
        ("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "free_page_reporting": True}),
        ("/actions", {"action_type": "InstanceStart"}),
    ]


def _drive(name: str, path: str, *, read_only: bool) -> tuple[str, dict[str, Any]]:
    body = {
        "drive_id": name,
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": read_only,
    }
    return f"/drives/{name}", body


def restoration() -> _Requests:
    """Return what is told a Firecracker that is to start from a snapshot."""
    memory = {"backend_type": "File", "backend_path": f"/proc/self/fd/{DESCRIPTOR}"}
    return [("/snapshot/load", {"snapshot_path": f"{FOLDER}/devices", "mem_backend": memory})]


class Firecracker:
    """See the module.

    Args:
        networks: Of the boxes of the node.
    """

    chains = False
    """Whether disks may stand on others."""

    def __init__(self, networks: BoxNetworks) -> None:
        self._networks = networks

    @contextlib.contextmanager
    def jailed(
        self, plan: Plan, network: BoxNetwork, snapshot: Snapshot | None
    ) -> Generator[dict[str, Any]]:
        """Yield what the jail of a machine has for it: fields of a launch request."""
        yield {
            "devices": ("kvm", "net/tun") if plan.hardware.network else ("kvm",),
            "keep": () if snapshot is None else (snapshot.memory,),
        }

    async def start(self, jail: Guest, start: Start) -> tuple[Machine, Guest]:
        """As the protocol's."""
        folder, snapshot, network = start.folder, start.snapshot, start.network
        if snapshot is not None:
            await asyncio.to_thread(_give, snapshot.devices, folder / "devices")

        async def begin() -> tuple[FirecrackerMonitor, Guest]:
            monitor = await FirecrackerMonitor.connect(folder / _SOCKET)
            if snapshot is None and not _is_unpacked(start.plan):
                await monitor.check_version()
            requests = configuration(start.plan) if snapshot is None else restoration()
            if network.tap is None:
                await _make(monitor, requests)
            else:
                with _namespace_of(start.pid) as namespace:
                    await self._networks.lend_tap(network, start.owner, namespace)
                    await _make(monitor, requests)
                    await self._networks.fetch_tap(network, namespace)
            if snapshot is not None:
                start.note()
                await monitor.go_on()
            if start.guest is not None:
                await start.guest.renew(lambda: self.reach(folder))
                return monitor, start.guest
            return monitor, await _guest_of(folder, _BOOT_S)

        call = [start.plan.program, "--api-sock", f"{FOLDER}/{_SOCKET}", "--id", "machine"]
        return await start_machine(jail, folder, call, _SOCKET, begin, kept=snapshot is not None)

    async def find(self, folder: Path) -> tuple[FirecrackerMonitor, Guest]:
        """As the protocol's."""
        monitor = await FirecrackerMonitor.connect(folder / _SOCKET)
        await monitor.go_on()  # where a daemon died while it stood still
        return monitor, await _guest_of(folder, _ANSWER_S)

    async def reach(self, folder: Path) -> socket.socket:
        """As the protocol's."""
        return await connect_vsock(folder / "vsock", PORT, _ANSWER_S)

    def save_memory(self, folder: Path, target: int, cgroup: Cgroup, init: int) -> None:
        """As the protocol's."""
        path = folder / "memory"
        try:
            file = open_file(path)
        except FileNotFoundError as error:
            raise NodeError(f"Firecracker has written no memory to {path}") from error
        try:
            copy_not_zero(file, target)
        finally:
            os.close(file)
            path.unlink(missing_ok=True)

    def memory(self, folder: Path, size: int, cgroup: Cgroup, init: int) -> int:
        """As the protocol's."""
        path = folder / "memory"
        try:
            file = open_file(path)
        except FileNotFoundError as error:
            raise NodeError(f"Firecracker has written no memory to {path}") from error
        try:
            return memory_from(file, size)
        finally:
            os.close(file)
            path.unlink(missing_ok=True)


async def _make(monitor: FirecrackerMonitor, requests: _Requests) -> None:
    for path, body in requests:
        await monitor.tell("PUT", path, body, timeout_s=_REQUEST_S)


async def _guest_of(folder: Path, timeout_s: float) -> Guest:
    return await Guest.over(await connect_vsock(folder / "vsock", PORT, timeout_s))


def _is_unpacked(plan: Plan) -> bool:
    """Return whether its kernel is an ELF file, which every Firecracker boots."""
    assert plan.kernel is not None
    with plan.kernel[0].open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _give(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    os.chown(target, USER, USER)


@contextlib.contextmanager
def _namespace_of(pid: int) -> Generator[int]:
    """Yield the network namespace of a process."""
    try:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NodeError(f"the jail of the machine is gone: {error.strerror}") from error
    try:
        yield namespace
    finally:
        os.close(namespace)

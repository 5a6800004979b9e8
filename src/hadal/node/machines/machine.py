"""One virtual machine: its hypervisor as the only command of a box of its own, its jail, and the guest in it.

The jail is a container like any other: it has namespaces, groups, a user and a filter of system calls, it
ends with its lease, and a machine that breaks out of it finds itself in it.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hadal.errors import LaunchError, NodeError
from hadal.node.guest import Guest, GuestLostError
from hadal.node.guest_command import CommandOrder, Exit, Unread
from hadal.node.machines.jail_files import socket_path
from hadal.node.machines.qemu import FOLDER, Hardware, uefi_firmware
from hadal.node.network import BoxNetwork
from hadal.node.wire import Tag
from hadal.sandbox.specs import MachineSpec

__all__ = [
    "USER",
    "Control",
    "Lying",
    "Machine",
    "hardware_of",
    "measure_tsc_khz",
    "settle",
    "settle_again",
    "start_machine",
]

_LOG = logging.getLogger(__name__)
USER = 1000
"""Of the hypervisor in its jail."""
_CONSOLE_BYTES = 64 * 1024
_START_S = 60.0
_ANSWER_S = 10.0
_QUIET_S = 0.002
_END_S = 0.5


class _Console(Unread):
    """The end of what a machine says on its console, for when it does not answer."""

    def last_lines(self) -> str:
        """Return the last of it, for an error."""
        lines = self.end.decode(errors="replace").replace("\r", "").strip().splitlines()
        return " / ".join(lines[-3:])


class Control(Protocol):
    """What the node tells the program that runs a machine. All of it raises NodeError where that is not done."""

    async def stop(self) -> None:
        """Let its processors stand still, and all that it was writing be written."""

    async def go_on(self) -> None:
        """Let them run."""

    async def save_state(self) -> None:
        """Write the state of its devices, as `devices` in its folder; it has to stand still."""

    def parted(self, guest: Guest) -> contextlib.AbstractAsyncContextManager[None]:
        """Return a block in which its state is saved, with what that takes of the connection to its guest."""
        ...

    async def close(self) -> None:
        """Hang up; the machine stays as it is."""


@dataclass
class Lying:
    """A machine that stands still, and that nobody reaches.

    Attributes:
        known: Commands that its guest knows, and whether each has ended.
        sleeps: To be set where it is not to go on.
    """

    known: dict[int, bool]
    sleeps: bool = False


@dataclass
class Machine:
    """A machine.

    Attributes:
        jail: The guest of the box that its hypervisor runs in; None while it sleeps.
        control: What its hypervisor is told by; None while it sleeps.
        folder: Of the machine, on the host: its disk and its sockets.
    """

    jail: Guest | None
    control: Control | None
    folder: Path
    _still: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def monitor(self) -> Control:
        """Of the hypervisor.

        Raises:
            NodeError: The machine sleeps: there is none.
        """
        if self.control is None:
            raise NodeError(f"the machine of box {self.folder.parent.name} sleeps")
        return self.control

    @classmethod
    async def find(
        cls, jail: Path, folder: Path, find: Callable[[Path], Awaitable[tuple[Control, Guest]]]
    ) -> tuple["Machine", Guest]:
        """Connect to a machine that another daemon has started, and to its guest.

        Args:
            jail: Where the guest of its jail listens.
            folder: Of the machine, on the host.
            find: Of its hypervisor.

        Raises:
            NodeError: It is not there any more.
        """
        async with contextlib.AsyncExitStack() as opened:
            keeper = await Guest.connect(jail)
            opened.callback(keeper.close)
            monitor, guest = await find(folder)
            opened.push_async_callback(monitor.close)
            opened.callback(guest.close)
            await _go_on(guest)
            opened.pop_all()
        return cls(keeper, monitor, folder), guest

    @contextlib.asynccontextmanager
    async def still(self, guest: Guest) -> AsyncGenerator[None]:
        """Yield while it stands still, and has its commands held: also in a copy, until it lets them go on.

        Args:
            guest: In it.

        Raises:
            NodeError: It does not, or does not go on.
        """
        async with self.held(guest), self.monitor.parted(guest):
            await self.monitor.stop()
            try:
                yield
            finally:
                await self.monitor.go_on()

    @contextlib.asynccontextmanager
    async def held(self, guest: Guest) -> AsyncGenerator[None]:
        """Yield while it has its commands held, so that its files are of one moment.

        Args:
            guest: In it.

        Raises:
            NodeError: It does not hold them, or does not let them go on.
        """
        async with self._still:
            await _hold(guest)
            try:
                yield
            finally:
                await guest.settle({Tag.HELD: 0})

    @contextlib.asynccontextmanager
    async def lying(
        self, guest: Guest, connect: Callable[[], Awaitable[socket.socket]]
    ) -> AsyncGenerator[Lying]:
        """Yield while it stands still with its commands held, and what its guest is sent is kept for later.

        Args:
            guest: In it.
            connect: To that.

        Raises:
            NodeError: It does not, or does not go on; it does, unless `sleeps` has been set in the block.
        """
        async with self._still:
            await _hold(guest)
            lying = Lying({})
            try:
                lying.known = await guest.part()
                try:
                    await self.monitor.stop()
                    yield lying
                finally:
                    if not lying.sleeps:
                        await self._get_up(guest, connect)
            finally:
                if not lying.sleeps:
                    await guest.settle({Tag.HELD: 0})

    async def _get_up(self, guest: Guest, connect: Callable[[], Awaitable[socket.socket]]) -> None:
        try:
            await self.monitor.go_on()
        except NodeError as error:
            guest.give_up(error.message)
            raise
        await guest.renew(connect)

    async def close(self) -> None:
        """Let go of it; it runs on."""
        if self.control is not None:
            await self.control.close()
        if self.jail is not None:
            self.jail.close()


async def start_machine(
    jail: Guest, folder: Path, call: list[str], listener: str,
    begin: Callable[[], Awaitable[tuple[Control, Guest]]], *, kept: bool = True,
) -> tuple[Machine, Guest]:  # fmt: skip
    """Start a hypervisor in a jail, and return when the guest of its machine answers.

    Args:
        jail: The guest of that; closed where it fails.
        folder: Of the machine, on the host.
        call: Of the hypervisor.
        listener: Where it listens, in the folder, when it is there.
        begin: Lets it make the machine, and connects to both.
        kept: Whether it takes the descriptors of its jail.

    Raises:
        LaunchError: It does not; with the end of what its console says.
    """
    console = _Console(_CONSOLE_BYTES)
    order = CommandOrder(
        arguments=[os.fsencode(a) for a in call],
        user=str(USER),
        directory=os.fsencode(FOLDER),
        kept=kept,
    )
    console.command = jail.execute(jail.last_id + 1, order, console)
    console.command.ended.add_done_callback(lambda ended: _log_end(ended, folder, console))
    try:
        await _listens(folder / listener, console)
        monitor, guest = await begin()
    except NodeError as error:
        why = f"{error.message}; {await _end_of(console)}its console: {console.last_lines()}"
        jail.close()
        raise LaunchError(f"the machine does not start: {why}") from error
    except BaseException:
        jail.close()
        raise
    return Machine(jail, monitor, folder), guest


async def _end_of(console: _Console) -> str:
    """Return how a hypervisor has ended, if it has: then whatever else failed failed for that."""
    assert console.command is not None
    with contextlib.suppress(TimeoutError, NodeError):
        ended = await asyncio.wait_for(asyncio.shield(console.command.ended), _END_S)
        return f"the hypervisor has ended with status {ended.status}; "
    return ""


def _log_end(ended: "asyncio.Future[Exit]", folder: Path, console: _Console) -> None:
    """Keep what a machine said last, where its hypervisor has ended and not with its jail."""
    if not ended.cancelled() and ended.exception() is None:
        status, details = ended.result().status, {"sandbox_id": folder.parent.name}
        _LOG.warning(
            "the hypervisor has ended with status %d: %s",
            status,
            console.last_lines(),
            extra=details,
        )


async def _listens(listener: Path, console: _Console) -> None:
    """Wait until a hypervisor listens: at its monitor last, when all else is there."""
    assert console.command is not None
    deadline = time.monotonic() + _START_S
    while True:
        if console.command.ended.done():
            refused = console.command.ended.exception()
            why = (
                f"ended with status {console.command.ended.result().status}"
                if refused is None
                else str(refused)
            )
            raise GuestLostError(f"the hypervisor has not started: {why}")
        if time.monotonic() > deadline:
            raise GuestLostError(f"the hypervisor has not started in {_START_S:.0f} s")
        with (
            contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
            socket_path(listener) as path,
        ):
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()
            return
        await asyncio.sleep(_QUIET_S)


async def settle(guest: Guest, hostname: str, etc: dict[str, bytes], network: BoxNetwork) -> None:
    """Give a machine its identity, and let its commands go on: after its boot, and after it was restored.

    Raises:
        GuestLostError: It does not take it.
    """
    await guest.settle(
        {
            Tag.HOSTNAME: hostname.encode(),
            Tag.FILE: [name.encode() + b"\0" + data for name, data in etc.items()],
            Tag.SEED: os.urandom(64),
            Tag.TIME: time.time_ns(),
            **({} if network.tap is None else {Tag.NETWORK: _network_text(network)}),
        }
    )
    await _go_on(guest)


async def settle_again(guest: Guest) -> None:
    """Tell a machine that has slept what time it is, and let its commands go on; it is who it was.

    Raises:
        NodeError: It does not take it.
    """
    await guest.settle({Tag.SEED: os.urandom(64), Tag.TIME: time.time_ns()})
    await _go_on(guest)


async def _hold(guest: Guest) -> None:
    """Hold the commands of a machine."""
    try:
        await guest.settle({Tag.HELD: 1})
    except NodeError:
        guest.tell({Tag.HELD: 0})  # if it is only slow, it comes to that too
        raise


async def _go_on(guest: Guest) -> None:
    """Put the clock of a machine right, and let its commands go on."""
    # It took a while to get there. As NTP does: what is asked quickest is known best.
    ahead = min([await _ahead(guest) for _ in range(2)])[1]
    await guest.settle({Tag.ADJUST: -ahead & 0xFFFF_FFFF_FFFF_FFFF, Tag.HELD: 0})


async def _ahead(guest: Guest) -> tuple[int, int]:
    """Return how long an answer took, and how far the clock of a machine is ahead of ours; in ns."""
    asked = time.time_ns()
    said = await guest.settle({})
    answered = time.time_ns()
    return answered - asked, said - (asked + answered) // 2


def _network_text(network: BoxNetwork) -> bytes:
    assert network.hardware is not None
    near, far = (part.hex(":") for part in network.hardware)
    return f"{network.address} {network.resolver} {far} {near} {network.mtu}".encode()


def hardware_of(spec: MachineSpec, layers: int, accelerator: str, tsc_khz: int) -> Hardware:
    """Return what a machine of this spec has.

    Raises:
        UnsupportedError: This host has no firmware for it.
    """
    firmware, guest = getattr(spec, "firmware", None), getattr(spec, "guest", None)
    return Hardware(
        board=spec.backend, memory_mb=spec.memory_mb, cpus=math.ceil(spec.cpus), layers=layers,
        network=spec.network.default != "none", accelerator=accelerator, tsc_khz=tsc_khz,
        firmware=uefi_firmware() if firmware == "uefi" else None, seed=guest == "cloud-init", guest=guest != "none",
    )  # fmt: skip


def measure_tsc_khz(program: Path) -> int:
    """Return the frequency of the host's time stamp counter; takes a tenth of a second.

    Raises:
        LaunchError: It cannot be measured here.
    """
    done = subprocess.run([program, "tsc"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"cannot measure the time stamp counter: {done.stderr.strip()}")
    return int(done.stdout)

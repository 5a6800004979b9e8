"""One virtual machine: QEMU as the only command of a box of its own, its jail, and the guest in it.

The jail is a container like any other: it has namespaces, groups, a user and a filter of system calls, it
ends with its lease, and a machine that breaks out of QEMU finds itself in it.
"""

import asyncio
import math
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from hadal.errors import LaunchError
from hadal.node.guest import CommandOrder, Guest, GuestCommand, GuestLostError
from hadal.node.machines.qemu import Hardware, microvm
from hadal.node.wire import Tag
from hadal.sandbox.specs import MicroVMSpec

__all__ = ["Machine", "start_machine"]

USER = 1000
"""Of QEMU in its jail."""
_CONSOLE_BYTES = 64 * 1024
_BOOT_S = 60.0
_QUIET_S = 0.002


@dataclass
class _Console:
    """The end of what a machine says on its console, for when it does not answer."""

    command: GuestCommand | None = None
    text: bytearray = field(default_factory=bytearray)
    _offsets: list[int] = field(default_factory=lambda: [0, 0])

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take what comes and forget what is old."""
        self.text += data
        del self.text[:-_CONSOLE_BYTES]
        self._offsets[stream - 1] = offset + len(data)
        if self.command is not None:
            self.command.acknowledge(*self._offsets)

    def last_lines(self) -> str:
        """Return the last of it, for an error."""
        lines = self.text.decode(errors="replace").replace("\r", "").strip().splitlines()
        return " / ".join(lines[-3:])


@dataclass
class Machine:
    """A machine that runs.

    Attributes:
        jail: The guest of the box that QEMU runs in.
        folder: Of the machine, on the host: its disk and its sockets.
    """

    jail: Guest
    folder: Path

    @classmethod
    async def find(cls, jail: Path, folder: Path) -> tuple["Machine", Guest]:
        """Connect to a machine that another daemon has started, and to its guest.

        Raises:
            GuestLostError: It is not there any more.
        """
        machine = cls(await Guest.connect(jail), folder)
        try:
            return machine, await Guest.connect(folder / "port", port=True)
        except BaseException:
            machine.close()
            raise

    def close(self) -> None:
        """Let go of it; it runs on."""
        self.jail.close()


async def start_machine(
    jail: Guest, folder: Path, program: str, spec: MicroVMSpec, hardware: Hardware, lease_s: int
) -> tuple[Machine, Guest]:
    """Start QEMU in a jail, and return when its guest answers.

    Raises:
        LaunchError: It does not; with the end of what its console says.
    """
    options = {
        "layers": hardware.layers,
        "pids": spec.pids,
        "shm_mb": spec.shm_mb,
        "lease_s": lease_s,
    }
    call = microvm(program, hardware, options)
    console = _Console()
    order = CommandOrder(
        arguments=[os.fsencode(a) for a in call], user=str(USER), directory=b"/machine"
    )
    console.command = jail.execute(jail.last_id + 1, order, console)
    try:
        guest = await _answer(folder / "port", console)
    except GuestLostError as error:
        raise LaunchError(
            f"the machine does not answer: {error.message}; its console: {console.last_lines()}"
        ) from error
    return Machine(jail, folder), guest


async def _answer(port: Path, console: _Console) -> Guest:
    assert console.command is not None
    deadline = time.monotonic() + _BOOT_S
    while True:
        left = deadline - time.monotonic()
        if console.command.ended.done() or left < 0:
            raise GuestLostError("QEMU has not started")
        try:
            return await Guest.connect(port, timeout_s=left, port=True)
        except GuestLostError as error:
            # It is not there yet, or bound and does not listen yet.
            if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                raise
        await asyncio.sleep(_QUIET_S)


async def settle(guest: Guest, hostname: str, etc: dict[str, bytes]) -> None:
    """Give a machine its identity: after its boot, and after it was restored.

    Raises:
        GuestLostError: It does not take it.
    """
    await guest.settle(
        {
            Tag.HOSTNAME: hostname.encode(),
            Tag.FILE: [name.encode() + b"\0" + data for name, data in etc.items()],
            Tag.TIME: time.time_ns(),
            Tag.SEED: os.urandom(64),
        }
    )


def hardware_of(spec: MicroVMSpec, layers: int, tsc_khz: int) -> Hardware:
    """Return what a machine of this spec has."""
    return Hardware(
        memory_mb=spec.memory_mb, cpus=math.ceil(spec.cpus), layers=layers, tsc_khz=tsc_khz
    )


def measure_tsc_khz(program: Path) -> int:
    """Return the frequency of the host's time stamp counter; takes a tenth of a second.

    Raises:
        LaunchError: It cannot be measured here.
    """
    done = subprocess.run([program, "tsc"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"cannot measure the time stamp counter: {done.stderr.strip()}")
    return int(done.stdout)

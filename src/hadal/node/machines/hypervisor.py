"""What a program that runs machines has to do for the node."""

import socket
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from hadal.node.cgroups import Cgroup
from hadal.node.guest import Guest
from hadal.node.machines.machine import Control, Machine
from hadal.node.machines.plan import Plan, Start
from hadal.node.machines.snapshots import Snapshot
from hadal.node.network import BoxNetwork

__all__ = ["Hypervisor"]


class Hypervisor(Protocol):
    """A program that runs machines, QEMU or Firecracker.

    Attributes:
        chains: Whether a disk may stand on others, so that it has only what differs from them.
    """

    chains: bool

    def jailed(
        self, plan: Plan, network: BoxNetwork, snapshot: Snapshot | None
    ) -> AbstractContextManager[dict[str, Any]]:
        """Return a block with what the jail of a machine has for it: fields of a launch request."""
        ...

    async def start(self, jail: Guest, start: Start) -> tuple[Machine, Guest]:
        """Start a machine.

        Args:
            jail: The guest of its jail; closed where it fails.
            start: All else.

        Raises:
            LaunchError: It does not start.
        """
        ...

    async def find(self, folder: Path) -> tuple[Control, Guest]:
        """Connect to a machine that runs, and to its guest.

        Args:
            folder: Of the machine, on the host.

        Raises:
            NodeError: It is not there any more.
        """
        ...

    async def reach(self, folder: Path) -> socket.socket:
        """Return a connection to the guest of a machine that runs, on which nothing has been said.

        Args:
            folder: Of the machine, on the host.

        Raises:
            NodeError: It is not there any more.
        """
        ...

    def save_memory(self, folder: Path, target: int, cgroup: Cgroup, init: int) -> None:
        """Write the memory of a machine whose state has just been saved into a file; what is zero becomes a hole.

        Args:
            folder: Of the machine, on the host.
            target: Descriptor of the file, which is empty.
            cgroup: Of its box.
            init: First process of that.

        Raises:
            NodeError: It is not what it was.
            OSError: The disk is full.
        """
        ...

    def memory(self, folder: Path, size: int, cgroup: Cgroup, init: int) -> int:
        """Return the descriptor of a copy of the memory of a machine whose state has just been saved.

        Args:
            folder: Of the machine, on the host.
            size: Bytes that it has.
            cgroup: Of its box.
            init: First process of that.

        Raises:
            NodeError: It is not what it was.
            OSError: There is too little memory.
        """
        ...

"""Networks by box: the manager is started when the first box wants one, or has one still."""

import asyncio
import hashlib
from collections.abc import Mapping

from hadal.errors import UnsupportedError
from hadal.node.network import (
    BoxNetwork,
    LiveNetwork,
    NetworkConfig,
    NetworkManager,
    NetworkStatistics,
)
from hadal.sandbox.network_policy import NetworkPolicy

__all__ = ["BoxNetworks"]


class BoxNetworks:
    """The networks of a node's boxes.

    Args:
        name: Of the node.
        mounts: File descriptor of the host's mount namespace, where the daemon has its own.
    """

    def __init__(self, name: str, mounts: int | None = None) -> None:
        short = hashlib.sha256(name.encode()).hexdigest()[:8]
        self._manager = NetworkManager(NetworkConfig(name=f"h{short}", mounts=mounts))
        self._taken: dict[str, BoxNetwork] = {}
        self._lock = asyncio.Lock()
        self._running = False

    async def recover(self, living: Mapping[str, LiveNetwork]) -> None:
        """Find the networks of living boxes again."""
        if not living:
            return
        found = {n.number: n for n in await self._manager.recover(living.values())}
        self._running = True
        self._taken = {box: found[n.number] for box, n in living.items() if n.number in found}

    async def take(self, box: str, policy: NetworkPolicy, *, machine: bool) -> BoxNetwork:
        """Give a box its network; whoever takes that of a `machine` closes its `tap`.

        Raises:
            UnsupportedError: This host cannot have any but none; the hint says what it needs.
        """
        if policy.default == "none":
            return BoxNetwork()
        async with self._lock:
            if not self._running:
                await self._manager.recover(())
                self._running = True
        network = self._taken[box] = await self._manager.take(policy, machine=machine)
        return network

    async def take_again(self, box: str) -> BoxNetwork:
        """Return the network of a machine that is to wake, as `take` did; none where it has none.

        Raises:
            NodeError: It cannot be had.
        """
        network = self._taken.get(box)
        return BoxNetwork() if network is None else await self._manager.take_again(network)

    async def lend_tap(self, network: BoxNetwork, owner: int, borrower: int) -> None:
        """As the manager's."""
        await self._manager.lend_tap(network, owner, borrower)

    async def fetch_tap(self, network: BoxNetwork, borrower: int) -> None:
        """As the manager's."""
        await self._manager.fetch_tap(network, borrower)

    async def update(self, box: str, policy: NetworkPolicy) -> None:
        """Change what a box may reach.

        Raises:
            UnsupportedError: It was made without a network, or is to have none.
        """
        if box not in self._taken:
            raise UnsupportedError(
                f"box {box} was made without a network, and cannot get one later",
                hint='make it with a policy whose default is "deny"',
            )
        await self._manager.update(self._taken[box], policy)

    async def statistics(self, box: str) -> NetworkStatistics:
        """Return what a box has sent, received and been denied."""
        if box not in self._taken:
            return NetworkStatistics()
        return await self._manager.statistics(self._taken[box])

    async def give_back(self, box: str) -> None:
        """Remove the network of a box, if it has one."""
        network = self._taken.pop(box, None)
        if network is not None:
            await self._manager.give_back(network)

    async def close(self) -> None:
        """Let go of them; those of living boxes stay."""
        if self._running:
            await self._manager.close()

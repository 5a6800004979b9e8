"""Networks of boxes: a pool of them, taken in about a millisecond, changed while boxes run.

    async with NetworkManager(NetworkConfig()) as manager:
        network = await manager.take(NetworkPolicy(allow=("github",)))
        ...                                     # LaunchRequest(network=network.path, ...)
        await manager.update(network, NetworkPolicy())
        await manager.give_back(network)

A network is made once and never used again: what a box leaves in one (sockets, settings, connections)
goes with it. router.py says how packets go, ruleset.py what is let through, resolver.py who answers for
names. What changes, changes on the event loop first and goes to the filter in the same order.
"""

import asyncio
import itertools
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Collection, Coroutine, Iterable
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

from hadal.errors import HadalError, NodeError, UnsupportedError
from hadal.node.network import namespace
from hadal.node.network.boxes import BoxState, hardware_addresses, link_name
from hadal.node.network.config import NetworkConfig
from hadal.node.network.denials import DenialLog
from hadal.node.network.filter import Filter
from hadal.node.network.handles import BoxNetwork, LiveNetwork, NetworkStatistics
from hadal.node.network.nftables import Element
from hadal.node.network.pool import NetworkPool
from hadal.node.network.resolver import Resolver
from hadal.node.network.router import Router
from hadal.node.network.rules import Rules, compile_policy
from hadal.node.network.ruleset import chain_name
from hadal.node.network.threads import Worker
from hadal.node.network.upstream import Upstream, system_resolvers
from hadal.sandbox.network_policy import NetworkPolicy

__all__ = ["NetworkManager"]

logger = logging.getLogger(__name__)

_UNUSED_CHAINS_MAX = 64
_DENIED = "the policy of the box does not allow this address"
_NEVER = "no policy allows this address: it is the node's, another box's, or special"


class NetworkManager:
    """All networks of a node, in the network namespace where it is started. Belongs to one event loop.

    Args:
        config: Settings.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        self._config = config or NetworkConfig()
        self._router = Router(self._config)
        self._boxes: dict[IPv4Address, BoxState] = {}
        self._users: Counter[str] = Counter()
        self._unused: OrderedDict[str, None] = OrderedDict()
        self._epochs = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._maker = Worker("hadal-network-maker")
        self._filterer = Worker("hadal-network-filter")
        self._filter: Filter | None = None
        self._pool: NetworkPool | None = None
        self._resolver: Resolver | None = None

    async def __aenter__(self) -> Self:
        await self.recover(())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def recover(self, live: Iterable[LiveNetwork]) -> list[BoxNetwork]:
        """Start: adopt networks of live boxes, and remove whatever else an earlier daemon left.

        Connections of adopted boxes go on. One whose network is not there any more is left out.

        Returns:
            The adopted networks.

        Raises:
            UnsupportedError: This host cannot have networks of boxes; the hint says what it needs.
            NodeError: Another daemon has the same name, or the kernel refuses something.
            ConfigError: A policy names a service that is not configured.
        """
        services = self._config.services
        wanted = [
            (item.number, compile_policy(item.policy, services), item.sleeps) for item in live
        ]
        try:
            if self._config.mounts is not None:
                await self._maker.do(namespace.enter_mounts, self._config.mounts)
            await self._maker.do(self._router.open)
            await self._filterer.do(namespace.enter, self._router.namespace)
            self._filter = await self._filterer.do(Filter, self._config)
            adopted = await self._reconcile(self._filter, wanted)
            await self._start_resolver()
        except BaseException:
            await self._close(remove=not wanted)
            raise
        reports = self._filter.reports
        asyncio.get_running_loop().add_reader(reports.fileno(), reports.read, self._reported)
        numbers = frozenset(box.number for box in self._boxes.values())
        self._pool = NetworkPool(self._config, self._router, self._maker, numbers)
        return adopted

    async def _start_resolver(self) -> None:
        upstream = Upstream(
            self._config.upstreams or system_resolvers(),
            timeout_s=self._config.upstream_timeout_s,
            port=self._config.upstream_port,
        )
        self._resolver = Resolver(self._boxes, upstream, self._config.never, self._admit)
        await self._resolver.start(*await self._maker.do(self._router.resolver_sockets))

    async def _reconcile(
        self, filter: Filter, wanted: list[tuple[int, Rules, bool]]
    ) -> list[BoxNetwork]:
        links = await self._maker.do(self._router.box_links)
        epochs = await self._filterer.do(filter.epochs)
        chains = await self._filterer.do(filter.policies)
        named = await self._filterer.do(filter.named)
        self._unused.update(dict.fromkeys(await self._filterer.do(filter.policy_chains)))
        self._epochs = itertools.count(max(epochs.values(), default=0) + 1)
        adopted: list[BoxNetwork] = []
        for number, rules, sleeps in wanted:
            if link_name(number) not in links and not sleeps:
                logger.warning("the network of a live box is gone", extra={"number": number})
                continue
            box = self._new_box(number, rules)
            epoch, chain = epochs.pop(box.address, None), chains.get(box.address)
            await self._adopt(filter, box, epoch, chain, named.get(box.address, []))
            adopted.append(BoxNetwork(number, None, box.address, self._config.resolver))
        nothing = compile_policy(NetworkPolicy(), {})
        for address, epoch in epochs.items():
            number = int(address) - int(self._config.address(0))
            dead = BoxState(number, address, nothing, epoch, DenialLog(0))
            elements = [*dead.identity(), *dead.policy(), *named.get(address, [])]
            await self._filterer.do(filter.remove, address, elements)
        alive = {link_name(box.number) for box in self._boxes.values()}
        await self._maker.do(self._router.delete_links, links - alive)
        self._trim_chains()
        return adopted

    async def _adopt(
        self,
        filter: Filter,
        box: BoxState,
        epoch: int | None,
        chain: str | None,
        named: list[Element],
    ) -> None:
        self._use_chain(box.rules)
        if epoch is None:  # the filter's table is of another version, and made anew
            add = [*box.identity(), *box.policy()]
            await self._filterer.do(filter.apply, box.rules, delete=[], add=add)
        elif chain == chain_name(box.rules):
            box.epoch, box.inherited = epoch, named
        else:  # its policy was changed, and the daemon ended before the filter was told
            old = BoxState(box.number, box.address, box.rules, epoch, box.denials)
            delete = [*old.policy(), *named]
            await self._filterer.do(filter.apply, box.rules, delete=delete, add=box.policy())

    async def take(self, policy: NetworkPolicy, *, machine: bool = False) -> BoxNetwork:
        """Take a network for a box. The box can do nothing with it that the policy does not allow.

        Args:
            policy: That.
            machine: Whether it is for a virtual machine.

        Raises:
            ConfigError: The policy names a service that is not configured here.
            NoCapacityError: There is no room for another network.
            NodeError: The kernel refuses the rules.
        """
        if policy.default == "none":
            return BoxNetwork()
        rules = compile_policy(policy, self._config.services)
        if self._pool is None:
            raise NodeError("the networks of this node are not started")
        number, fd = await (self._pool.take_tap() if machine else self._pool.take())
        box = self._new_box(number, rules)
        self._use_chain(rules)
        try:
            add = [*box.identity(), *box.policy()]
            await self._filterer.do(self._running().apply, rules, delete=[], add=add)
        except BaseException:
            if machine:
                os.close(fd)
            self._background(self._end(box))
            raise
        if machine:
            return BoxNetwork(
                number, None, box.address, self._config.resolver, fd, hardware_addresses(number), self._config.mtu
            )  # fmt: skip
        path = Path(f"/proc/{os.getpid()}/fd/{fd}")
        return BoxNetwork(number, path, box.address, self._config.resolver)

    async def take_again(self, network: BoxNetwork) -> BoxNetwork:
        """Make the link of a virtual machine again, when nobody has it any more.

        Returns:
            The same network, with a file at the other end of its link.

        Raises:
            NodeError: The kernel refuses it.
            UnsupportedError, NoCapacityError: As `take`.
        """
        assert network.number is not None
        # It is gone with the file at its other end, unless it was lent.
        await self._maker.do(self._router.delete_links, {link_name(network.number)})
        tap = await self._maker.do(self._router.make_tap, network.number)
        if tap is None:
            raise NodeError(f"network {network.number} is still in use")
        hardware = hardware_addresses(network.number)
        return replace(network, tap=tap, hardware=hardware, mtu=self._config.mtu)

    async def lend_tap(self, network: BoxNetwork, owner: int, borrower: int) -> None:
        """Put the link of a virtual machine into another namespace, where a program opens it by `LENT_TAP`.

        Args:
            network: Of it.
            owner: Id of the user who may.
            borrower: File descriptor of the namespace.

        Raises:
            NodeError: The kernel refuses it.
        """
        assert network.number is not None
        assert network.tap is not None
        await self._maker.do(self._router.lend_tap, network.number, network.tap, owner, borrower)

    async def fetch_tap(self, network: BoxNetwork, borrower: int) -> None:
        """Bring it back; only then it leads anywhere.

        Raises:
            NodeError: It is gone, or the kernel refuses it.
        """
        assert network.number is not None
        await self._maker.do(self._router.fetch_tap, network.number, borrower)

    async def update(self, network: BoxNetwork, policy: NetworkPolicy) -> None:
        """Change what a box may reach, at once: connections that are now forbidden are reset.

        Raises:
            UnsupportedError: The box has no network, or is to have none.
            ConfigError: The policy names a service that is not configured here.
            NodeError: The network is given back, or the kernel refuses the rules; nothing is changed.
        """
        if network.address is None or policy.default == "none":
            raise UnsupportedError(
                "a network can neither be given to a box that runs, nor taken from it",
                hint='make the box with default="deny", which allows nothing and can be changed',
            )
        rules = compile_policy(policy, self._config.services)
        await self._finish(self._change(network, rules))

    async def _change(self, network: BoxNetwork, rules: Rules) -> None:
        box = self._find(network)
        async with box.changing:
            self._find(network)
            now_s = asyncio.get_running_loop().time()
            before = (box.rules, box.epoch)
            old = [*box.policy(), *box.named(now_s), *box.inherited]
            box.rules, box.epoch = rules, next(self._epochs)
            new = [*box.policy(), *box.named(now_s)]
            self._use_chain(rules)
            try:
                await self._filterer.do(self._running().apply, rules, delete=old, add=new)
            except HadalError:
                self._leave_chain(rules)
                box.rules, box.epoch = before
                raise
            box.inherited = []
            self._leave_chain(before[0])

    async def give_back(self, network: BoxNetwork) -> None:
        """End a network, with its connections and counters. Not an error where it has ended already.

        Call it when the processes of the box are gone: the kernel keeps what they hold, cut off.

        Raises:
            NodeError: The kernel refuses it.
        """
        box = self._boxes.get(network.address) if network.address else None
        if box is not None and box.number == network.number:
            await self._finish(self._end(box))

    async def _end(self, box: BoxState) -> None:
        async with box.changing:
            if self._boxes.pop(box.address, None) is None:
                return
            elements = [*box.identity(), *box.policy(), *box.named(0.0), *box.inherited]
            try:
                await self._filterer.do(self._running().remove, box.address, elements)
            finally:
                self._leave_chain(box.rules)
                if self._pool is not None:
                    await self._pool.give_back(box.number)

    async def statistics(self, network: BoxNetwork) -> NetworkStatistics:
        """Return what a box has done with its network.

        Raises:
            NodeError: It is given back.
        """
        if network.address is None:
            return NetworkStatistics()
        box = self._find(network)
        filter = self._running()
        tallies = await self._filterer.do(filter.tallies, box.address)
        filter.reports.read(self._reported)
        return NetworkStatistics(
            sent=tallies["sent"],
            received=tallies["received"],
            rejected=tallies["rejected"],
            questions=box.questions,
            questions_refused=box.refused,
            denials=box.denials.entries(),
        )

    async def close(self) -> None:
        """Stop. Networks that are taken stay, for `recover`; without any, nothing is left on the host."""
        await self._close(remove=not self._boxes)

    async def _close(self, *, remove: bool) -> None:
        if self._pool is not None:
            await self._pool.close()
            self._pool = None
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._resolver is not None:
            await self._resolver.close()
        if self._filter is not None:
            asyncio.get_running_loop().remove_reader(self._filter.reports.fileno())
            await self._filterer.do(self._filter.close)
            self._filter = None
        await self._maker.do(self._router.close, remove=remove)
        self._maker.close()
        self._filterer.close()

    def _running(self) -> Filter:
        if self._filter is None:
            raise NodeError("the networks of this node are not started")
        return self._filter

    def _find(self, network: BoxNetwork) -> BoxState:
        box = self._boxes.get(network.address) if network.address else None
        if box is None or box.number != network.number:
            raise NodeError(f"network {network.number} has been given back")
        return box

    def _new_box(self, number: int, rules: Rules) -> BoxState:
        address = self._config.address(number)
        denials = DenialLog(self._config.denials_max)
        box = BoxState(number, address, rules, next(self._epochs), denials)
        self._boxes[address] = box
        return box

    async def _admit(
        self, box: BoxState, name: str, addresses: Collection[IPv4Address], ttl_s: int
    ) -> bool:
        if not box.rules.ports(name):
            return True  # by default
        if self._boxes.get(box.address) is not box:
            return False
        now_s = asyncio.get_running_loop().time()
        keys = {(name, address) for address in addresses}
        if len(box.admitted.keys() | keys) > self._config.names_max:
            box.named(now_s)
            if len(box.admitted.keys() | keys) > self._config.names_max:
                return False
        elements: list[Element] = []
        for key in keys:
            until_s = now_s + max(float(ttl_s), self._config.names_held_s)
            box.admitted[key] = until_s = max(until_s, box.admitted.get(key, 0.0))
            elements += box.name_elements(name, key[1], int((until_s - now_s) * 1000) + 1)
        await self._filterer.do(self._running().change, add=elements)
        return True

    def _reported(self, source: IPv4Address, address: IPv4Address, target: str) -> None:
        box = self._boxes.get(source)
        if box is not None:
            special = any(address in network for network in self._config.never)
            box.denials.add(target, _NEVER if special else _DENIED)

    def _use_chain(self, rules: Rules) -> None:
        self._users[chain_name(rules)] += 1
        self._unused.pop(chain_name(rules), None)

    def _leave_chain(self, rules: Rules) -> None:
        name = chain_name(rules)
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]
            self._unused[name] = None
            self._trim_chains()

    def _trim_chains(self) -> None:
        while len(self._unused) > _UNUSED_CHAINS_MAX and self._filter is not None:
            name, _ = self._unused.popitem(last=False)
            self._background(self._filterer.do(self._filter.delete_chain, name))

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for work that is done to its end even when the caller is cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except HadalError as error:
                logger.warning("network not tidied", extra={"reason": error.message})

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

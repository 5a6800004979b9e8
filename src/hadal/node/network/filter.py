"""The packet filter of the router: transactions for boxes, and what is left of an earlier daemon.

Everything here blocks, and is called in one thread of the router's namespace.
"""

import struct
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from hadal.errors import NodeError, UnsupportedError
from hadal.node.faults import reach
from hadal.node.network.boxes import ADDRESS_SETS, NAME_SETS
from hadal.node.network.config import NetworkConfig
from hadal.node.network.connections import forget_connections
from hadal.node.network.denials import PacketReports
from hadal.node.network.netlink import NETFILTER, NetlinkSocket
from hadal.node.network.nftables import Element, FilterTable, RuleLibrary, Tally
from hadal.node.network.rules import Rules
from hadal.node.network.ruleset import (
    REPORT_GROUP,
    TABLE,
    chain_name,
    delete_chain_text,
    policy_chain,
    router_ruleset,
    version_chain,
)

__all__ = ["Filter"]


class Filter:
    """The router's table. Made in a thread of the router's namespace, and used there only.

    Args:
        config: Settings.

    Raises:
        UnsupportedError: nftables is not installed, or the kernel lacks a part of it.
    """

    def __init__(self, config: NetworkConfig) -> None:
        self._library = RuleLibrary()
        rules = router_ruleset(
            boxes=IPv4Network(config.boxes),
            resolver=config.resolver,
            never=config.never,
            questions_per_s=config.questions_per_s,
            connections_max=config.connections_max,
        )
        try:
            self._table = FilterTable(TABLE)
            self._connections = NetlinkSocket(NETFILTER)
            self.reports = PacketReports(REPORT_GROUP)
            self._chains = self._table.chains()
            if version_chain(rules) not in self._chains:
                self._library.run(f"table inet {TABLE} {{ }}\ndelete table inet {TABLE}\n{rules}")
                self._chains = set[str]()
        except (OSError, NodeError) as error:
            raise UnsupportedError(
                f"networks of boxes need nftables: {error}",
                hint="the kernel needs nf_tables with inet, nat, ct, fib, reject, limit, connlimit and log",
            ) from error
        self.change = self._table.change

    def apply(self, rules: Rules, *, delete: Sequence[Element], add: Sequence[Element]) -> None:
        """Change elements of a box whose policy is `rules`; its chain is made where there is none.

        Raises:
            NodeError: The kernel refuses the chain.
            NetlinkError: It refuses an element; nothing is changed.
        """
        name = chain_name(rules)
        if name not in self._chains:
            self._library.run(policy_chain(rules))
            self._chains.add(name)
            reach("network: chain of a policy added")
        self._table.change(delete=delete, add=add)

    def delete_chain(self, name: str) -> None:
        """Delete a chain that nothing leads to.

        Raises:
            NodeError: Something does.
        """
        self._library.run(delete_chain_text(name))
        self._chains.discard(name)

    def policy_chains(self) -> set[str]:
        """Return the names of the chains of policies."""
        return {name for name in self._chains if name.startswith("policy_")}

    def remove(self, address: IPv4Address, elements: Sequence[Element]) -> None:
        """Delete the elements of a box, then its connections.

        Raises:
            NetlinkError: The kernel refuses it.
        """
        self._table.change(delete=elements)
        reach("network: elements of a box deleted")
        forget_connections(self._connections, address)

    def tallies(self, address: IPv4Address) -> Mapping[str, Tally]:
        """Return the counters of a box by the names of their sets."""
        return {name: self._table.tally(name, address.packed) for name in ADDRESS_SETS}

    def epochs(self) -> dict[IPv4Address, int]:
        """Return the marks of all boxes that have a policy."""
        return {
            IPv4Address(e.key): struct.unpack("=I", e.value)[0]
            for e in self._table.elements("epochs")
            if e.value is not None
        }

    def policies(self) -> dict[IPv4Address, str]:
        """Return the chains of all boxes that have a policy."""
        return {IPv4Address(e.key): e.goto for e in self._table.elements("policies") if e.goto}

    def named(self) -> dict[IPv4Address, list[Element]]:
        """Return the elements for names that each box knows."""
        found: dict[IPv4Address, list[Element]] = {}
        for name in NAME_SETS:
            for e in self._table.elements(name):
                # With a timeout, because it may be gone when it is deleted.
                element = Element(e.set, e.key, timeout_ms=1)
                found.setdefault(IPv4Address(e.key[:4]), []).append(element)
        return found

    def close(self) -> None:
        """Free what is held here; the rules stay."""
        self.reports.close()
        self._connections.close()
        self._table.close()
        self._library.close()

"""One box as the packet filter and the resolver know it. Belongs to the event loop; no I/O."""

import asyncio
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from hadal.node.network.denials import DenialLog
from hadal.node.network.nftables import Element
from hadal.node.network.rules import Rules
from hadal.node.network.ruleset import chain_name

__all__ = [
    "ADDRESS_SETS",
    "NAME_SETS",
    "BoxState",
    "hardware_address",
    "hardware_addresses",
    "link_name",
]

ADDRESS_SETS = ("sent", "received", "rejected")
NAME_SETS = ("names", "name_ports")
_IFNAME_BYTES = 16
_PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17}


def link_name(number: int) -> str:
    """Return the name of a box's link in the router."""
    return f"box{number}"


def hardware_address(side: int, number: int) -> bytes:
    """Return an address that is nobody's but ours: locally administered (IEEE 802)."""
    return bytes((2, 0x68, side)) + number.to_bytes(3, "big")


def hardware_addresses(number: int) -> tuple[bytes, bytes]:
    """Return those of a box's network: of the router's end, and of the box's."""
    return hardware_address(1, number), hardware_address(2, number)


@dataclass(eq=False)
class BoxState:
    """A box with a network.

    Attributes:
        number: Of its network, from 2; names its link and address.
        address: Its address.
        rules: Its policy.
        epoch: What its connections are marked with; new with each change of policy.
        denials: What it was denied.
        admitted: Addresses that it knows for names, and until when, in seconds of the event loop.
        inherited: Elements for names that it knew before the daemon was restarted; which names these
            were is not known, so that they end with the next change of policy.
        pending: Questions that wait for an answer.
        streams: Connections to the resolver.
        questions: That it has asked.
        refused: Of these, by policy.
        changing: Held while its policy changes.
    """

    number: int
    address: IPv4Address
    rules: Rules
    epoch: int
    denials: DenialLog
    admitted: dict[tuple[str, IPv4Address], float] = field(
        default_factory=dict[tuple[str, IPv4Address], float]
    )
    inherited: list[Element] = field(default_factory=list[Element])
    pending: int = 0
    streams: int = 0
    questions: int = 0
    refused: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def identity(self) -> list[Element]:
        """Return the elements that stay as long as the box."""
        link = link_name(self.number).encode().ljust(_IFNAME_BYTES, b"\0")
        key = self.address.packed
        return [Element("boxes", link + key), *(Element(name, key) for name in ADDRESS_SETS)]

    def policy(self) -> list[Element]:
        """Return the elements that say its policy; replaced together when it changes."""
        key, mark = self.address.packed, struct.pack("=I", self.epoch)
        return [
            Element("policies", key, goto=chain_name(self.rules)),
            Element("epochs", key, value=mark),
            Element("live", key + mark),
        ]

    def named(self, now_s: float) -> list[Element]:
        """Return the elements for the names that its policy allows now, and forget what has expired."""
        self.admitted = {k: until for k, until in self.admitted.items() if until > now_s}
        return [
            element
            for (name, address), until in self.admitted.items()
            if self.rules.is_allowed(name)
            for element in self.name_elements(name, address, int((until - now_s) * 1000) + 1)
        ]

    def name_elements(self, name: str, address: IPv4Address, timeout_ms: int) -> list[Element]:
        """Return what lets the box reach an address under a name."""
        found: list[Element] = []
        pair = self.address.packed + address.packed
        for allowed in self.rules.ports(name):
            if allowed is None:
                found.append(Element("names", pair, timeout_ms=timeout_ms))
            else:
                port, protocol = allowed
                key = pair + struct.pack("!BxxxHxx", _PROTOCOL_NUMBERS[protocol], port)
                found.append(Element("name_ports", key, timeout_ms=timeout_ms))
        return found

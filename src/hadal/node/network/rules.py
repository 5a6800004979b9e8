"""A policy as the node enforces it: services replaced by what they are, addresses and names apart."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network

from hadal.errors import ConfigError
from hadal.sandbox.network_policy import (
    AddressEntry,
    DomainEntry,
    Entry,
    NetworkPolicy,
    Protocol,
    ServiceEntry,
    parse_entry,
)

__all__ = ["NEVER", "PRIVATE", "Rules", "compile_policy"]

NEVER = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local: metadata of nearly every cloud
        "100.100.100.200/32",  # metadata of Alibaba Cloud
        "168.63.129.16/32",  # the same of Azure
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
"""What no policy can allow; the boxes' own range and the node are added to it."""

PRIVATE = tuple(
    IPv4Network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
    )
)
"""What is reached only where an entry names addresses: neither by default nor by a domain."""


@dataclass(frozen=True)
class Rules:
    """A policy without services.

    Attributes:
        open: Whether what nothing names is allowed.
        allow: Addresses.
        deny: Addresses.
        allow_names: Domains.
        deny_names: Domains; their ports mean nothing.
    """

    open: bool
    allow: tuple[AddressEntry, ...]
    deny: tuple[AddressEntry, ...]
    allow_names: tuple[DomainEntry, ...]
    deny_names: tuple[DomainEntry, ...]

    @cached_property
    def digest(self) -> str:
        """16 characters that are the same for the same rules only."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def is_denied(self, name: str) -> bool:
        """Return whether a name is denied by an entry of its own."""
        return any(_covers(entry, name) for entry in self.deny_names)

    def is_allowed(self, name: str) -> bool:
        """Return whether a name may be asked for."""
        if self.is_denied(name):
            return False
        return self.open or any(_covers(entry, name) for entry in self.allow_names)

    def ports(self, name: str) -> frozenset[tuple[int, Protocol] | None]:
        """Return the ports that entries allow for a name; None among them is for everything."""
        found: set[tuple[int, Protocol] | None] = set()
        for entry in self.allow_names:
            if not _covers(entry, name):
                continue
            if entry.port is None:
                found.add(None)
            else:
                protocols: tuple[Protocol, ...] = (
                    (entry.protocol,) if entry.protocol else ("tcp", "udp")
                )
                found |= {(entry.port, protocol) for protocol in protocols}
        return frozenset(found)

    def may_answer(self, address: IPv4Address, never: Iterable[IPv4Network]) -> bool:
        """Return whether a name may lead to an address: a private one only where an entry names it."""
        if any(address in network for network in never):
            return False
        named = any(address in entry.network for entry in self.allow)
        return named or not any(address in network for network in PRIVATE)


def _covers(entry: DomainEntry, name: str) -> bool:
    if entry.below:
        return name.endswith(f".{entry.name}")
    return name == entry.name


def compile_policy(policy: NetworkPolicy, services: Mapping[str, tuple[str, ...]]) -> Rules:
    """Replace services by their entries, and sort.

    Raises:
        ConfigError: A service is not known on this node, or not configured.
    """
    allowed = _expand(policy.allowed_entries(), services)
    denied = _expand(policy.denied_entries(), services)
    return Rules(
        open=policy.default == "allow",
        allow=tuple(e for e in allowed if isinstance(e, AddressEntry)),
        deny=tuple(e for e in denied if isinstance(e, AddressEntry)),
        allow_names=tuple(e for e in allowed if isinstance(e, DomainEntry)),
        deny_names=tuple(e for e in denied if isinstance(e, DomainEntry)),
    )


def _expand(entries: Iterable[Entry], services: Mapping[str, tuple[str, ...]]) -> list[Entry]:
    found: list[Entry] = []
    for entry in entries:
        if not isinstance(entry, ServiceEntry):
            found.append(entry)
            continue
        texts = services.get(entry.name)
        if not texts:
            known = ", ".join(sorted(name for name, value in services.items() if value))
            problem = "unknown on this node" if texts is None else "not configured on this node"
            raise ConfigError(
                f"network policy: service {entry.name!r} is {problem}; it knows {known}",
                hint=f"add {entry.name} to the services of the node, or name domains instead",
            )
        members = [parse_entry(text) for text in texts]
        if nested := [m for m in members if isinstance(m, ServiceEntry)]:
            raise ConfigError(
                f"services: {entry.name}: expected domains and addresses, got {nested[0].name!r}"
            )
        found += members
    return found

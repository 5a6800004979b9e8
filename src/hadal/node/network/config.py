"""Settings of a node's networks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from hadal.errors import ConfigError
from hadal.node.network.rules import NEVER
from hadal.node.network.services import SERVICES

__all__ = ["FIRST_NUMBER", "NetworkConfig"]

FIRST_NUMBER = 2
"""Of the boxes' networks: 0 is the range itself, 1 the router."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Settings of a node's networks; those of two nodes on one machine differ in `name`.

    Attributes:
        name: Names the host's link, its table and the directory of this node; at most 12 characters.
        directory: Where the router's namespace is kept, so that it outlives the daemon.
        mounts: File descriptor of the mount namespace in which it is kept; None for the daemon's.
        boxes: The boxes' addresses. They are seen in the router only, so that this range may be in use
            elsewhere, but a box cannot reach it there.
        uplinks: Private addresses for the link between router and host; two that the host does not
            use are taken.
        pool: Networks that are kept ready.
        mtu: Bytes in a packet; not more than the machine's way out takes.
        upstreams: Addresses of resolvers. Default: the machine's own.
        upstream_port: Where they listen.
        upstream_timeout_s: Seconds until the next one is asked.
        services: What named services stand for; one without entries is not configured.
        questions_per_s: Packets to the resolver that a box may send each second; three times as many
            at once.
        connections_max: Connections that a box may have at a time.
        names_max: Addresses that a box may know by name at a time.
        names_held_s: Seconds that such an address can be reached at least, where its time is shorter.
        denials_max: Denials kept for each box.
    """

    name: str = "hadal"
    directory: Path = Path("/run/hadal/network")
    mounts: int | None = None
    boxes: str = "10.201.0.0/16"
    uplinks: str = "10.200.255.0/24"
    pool: int = 16
    mtu: int = 1500
    upstreams: tuple[str, ...] = ()
    upstream_port: int = 53
    upstream_timeout_s: float = 2.0
    services: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(SERVICES))
    questions_per_s: int = 100
    connections_max: int = 4096
    names_max: int = 1024
    names_held_s: float = 60.0
    denials_max: int = 64

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,11}", self.name):
            raise ConfigError(
                f"network: name: expected up to 12 of a-z, 0-9 and _, got {self.name!r}"
            )
        for field_name, prefix in (("boxes", 30), ("uplinks", 31)):
            text = getattr(self, field_name)
            try:
                network = IPv4Network(text)
            except ValueError as error:
                raise ConfigError(
                    f"network: {field_name}: expected an IPv4 network, got {text!r}: {error}"
                ) from error
            if not 8 <= network.prefixlen <= prefix or not network.is_private:
                raise ConfigError(
                    f"network: {field_name}: expected a private network of prefix 8 to {prefix}, got {text}"
                )

    @property
    def resolver(self) -> IPv4Address:
        """The router's address for boxes: their resolver and gateway."""
        return IPv4Network(self.boxes)[1]

    @property
    def capacity(self) -> int:
        """How many boxes have room."""
        return IPv4Network(self.boxes).num_addresses - FIRST_NUMBER - 1

    @property
    def never(self) -> tuple[IPv4Network, ...]:
        """What no policy can allow: the boxes themselves and the node beside what is special anywhere."""
        return (*NEVER, IPv4Network(self.boxes), IPv4Network(self.uplinks))

    def address(self, number: int) -> IPv4Address:
        """Return the address of a network."""
        return IPv4Network(self.boxes)[number]

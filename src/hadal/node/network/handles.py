"""What the daemon holds of a box's network."""

from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from hadal.node.network.denials import Denial
from hadal.node.network.nftables import Tally
from hadal.sandbox.network_policy import NetworkPolicy

__all__ = ["BoxNetwork", "LiveNetwork", "NetworkStatistics"]

_NONE = Tally()


@dataclass(frozen=True)
class BoxNetwork:
    """A network that a box has taken. One without a number is none: the box has loopback only.

    Attributes:
        number: Names it for `LiveNetwork`, after a restart of the daemon.
        path: Of its namespace, for the launcher; None for an adopted one, whose box runs already.
        address: Of the box.
        resolver: The only one that it can ask; also its gateway.
        tap: Of a virtual machine, instead of a namespace: the file at the other end of its link. Whoever takes
            the network closes it.
        hardware: Addresses of the router's end and of the machine's.
        mtu: Bytes in a packet.
    """

    number: int | None = None
    path: Path | None = None
    address: IPv4Address | None = None
    resolver: IPv4Address | None = None
    tap: int | None = None
    hardware: tuple[bytes, bytes] | None = None
    mtu: int = 0

    @property
    def resolv_conf(self) -> bytes:
        """What belongs into the box's /etc/resolv.conf."""
        if self.resolver is None:
            return b""
        return f"nameserver {self.resolver}\noptions edns0 timeout:5 attempts:2\n".encode()


@dataclass(frozen=True)
class LiveNetwork:
    """A network of a box that has outlived its daemon.

    Attributes:
        number: As `BoxNetwork.number`.
        policy: What it may reach.
        sleeps: Whether its box has no process that could hold its link: then that is made again by `take_again`.
    """

    number: int
    policy: NetworkPolicy
    sleeps: bool = False


@dataclass(frozen=True)
class NetworkStatistics:
    """What a box has done with its network, since it took it.

    Attributes:
        sent: Let through, from the box.
        received: To the box.
        rejected: Not let through.
        questions: Asked of the resolver.
        questions_refused: Of these, by policy.
        denials: What it was denied, the oldest first.
    """

    sent: Tally = _NONE
    received: Tally = _NONE
    rejected: Tally = _NONE
    questions: int = 0
    questions_refused: int = 0
    denials: tuple[Denial, ...] = ()

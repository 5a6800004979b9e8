"""What a box was denied, so that its user sees why something failed: the last of it, and bounded."""

import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address

from hadal.node.network.netlink import (
    ACK,
    NETFILTER,
    Message,
    NetlinkSocket,
    attribute,
    big_u32,
    read_attributes,
)

__all__ = ["Denial", "DenialLog", "PacketReports"]

_PACKET, _CONFIGURE = 4 << 8, 4 << 8 | 1
_GENERIC = struct.Struct("!BBH")
_COMMAND, _MODE, _QUEUE, _BIND, _COPY_PACKET = 1, 2, 5, 1, 2
_PAYLOAD = 9
_SNAP_BYTES = 64
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}


@dataclass(frozen=True)
class Denial:
    """Something that a box asked for and did not get.

    Attributes:
        target: `192.0.2.1:443/tcp`, or a domain.
        reason: Why.
        count: How often, at least: packets are reported up to a limit.
        time_s: Last time, in seconds since 1970.
    """

    target: str
    reason: str
    count: int
    time_s: float


class DenialLog:
    """The last denials of one box, one entry for each target.

    Args:
        entries_max: How many are kept.
    """

    def __init__(self, entries_max: int) -> None:
        self._entries: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()
        self._max = entries_max

    def add(self, target: str, reason: str) -> None:
        """Note one."""
        count, _ = self._entries.pop((target, reason), (0, 0.0))
        self._entries[target, reason] = (count + 1, time.time())
        if len(self._entries) > self._max:
            self._entries.popitem(last=False)

    def entries(self) -> tuple[Denial, ...]:
        """Return them, the oldest first."""
        return tuple(
            Denial(target, reason, count, when)
            for (target, reason), (count, when) in self._entries.items()
        )


class PacketReports:
    """The packets that the filter refuses, as its `log group` rule reports them.

    Made in the namespace of the filter; its socket may be read anywhere.

    Args:
        group: Number in the rule.

    Raises:
        OSError: The kernel cannot report packets, or somebody else reads this group.
    """

    def __init__(self, group: int) -> None:
        self._socket = NetlinkSocket(NETFILTER)
        mode = struct.pack("!IBB", _SNAP_BYTES, _COPY_PACKET, 0)
        settings = (
            attribute(_COMMAND, bytes([_BIND])),
            attribute(_MODE, mode) + big_u32(_QUEUE, 1),
        )
        self._socket.send(
            [
                Message(_CONFIGURE, _GENERIC.pack(0, 0, group) + body, ACK, "report packets")
                for body in settings
            ]
        )

    def fileno(self) -> int:
        """Return the file descriptor, to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def read(self, found: Callable[[IPv4Address, IPv4Address, str], None]) -> None:
        """Call with source, address and target of each packet that has been reported; does not wait."""
        try:
            messages = self._socket.read()
        except OSError:
            return  # some are lost, which the limit of the rule makes likely anyway
        for kind, body in messages:
            if kind != _PACKET:
                continue
            packet = dict(read_attributes(body[_GENERIC.size :])).get(_PAYLOAD, b"")
            if len(packet) >= 20 and packet[0] >> 4 == 4:
                found(IPv4Address(packet[12:16]), IPv4Address(packet[16:20]), _target(packet))


def _target(packet: bytes) -> str:
    address = IPv4Address(packet[16:20])
    protocol = _PROTOCOLS.get(packet[9], str(packet[9]))
    ports = packet[(packet[0] & 15) * 4 :]
    if protocol in ("tcp", "udp") and len(ports) >= 4:
        return f"{address}:{int.from_bytes(ports[2:4], 'big')}/{protocol}"
    return f"{address}/{protocol}"

"""Links, addresses, routes and neighbours, as messages of rtnetlink."""

import errno
import struct
import time
from ipaddress import IPv4Address, IPv4Network

from hadal.node.network.netlink import (
    ACK,
    CREATE,
    DUMP,
    EXCLUSIVE,
    Message,
    NetlinkError,
    NetlinkSocket,
    attribute,
    nested,
    read_attributes,
    text,
    u32,
)

__all__ = [
    "LOOPBACK_IDX",
    "add_address",
    "add_neighbour",
    "add_route",
    "configure_link",
    "delete_group",
    "delete_link",
    "link_names",
    "link_up",
    "make_veth",
    "move_link",
    "set_group",
    "used_networks",
    "wait_until_up",
]

LOOPBACK_IDX = 1
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _NEWROUTE, _GETROUTE, _NEWNEIGH = 16, 17, 18, 20, 24, 26, 28
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_IFF_UP, _IFF_NOARP = 1, 0x80
_INET = 2
_MAIN_TABLE, _STATIC, _UNICAST, _PERMANENT = 254, 4, 1, 0x80
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 18, 28
_IFLA_GROUP, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 27, 31, 32
_IFLA_OPERSTATE, _OPERSTATE_UP = 16, b"\6"
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5


def _new(kind: int, body: bytes, what: str) -> Message:
    return Message(kind, body, ACK | CREATE | EXCLUSIVE, what)


def make_veth(
    name: str,
    peer: str,
    *,
    namespace: int,
    near: bytes,
    far: bytes,
    mtu: int,
    index: int,
    peer_index: int = 0,
) -> Message:
    """Make a pair of links: `name` here and up, `peer` in another namespace and still down.

    `name` neither asks for hardware addresses nor answers: its neighbours are added for good.

    Args:
        name: At most 15 characters.
        peer: Name of the other end.
        namespace: File descriptor of where that is.
        near: Hardware address of `name`, 6 bytes.
        far: Of `peer`.
        mtu: Bytes in a packet.
        index: Of `name`, so that nobody has to ask for it.
        peer_index: Of `peer`; 0 leaves it to the kernel. Not the same: the kernel would take the pair
            for one link without another end, and let packets through only after up to a second.
    """

    def end(name: str, index: int, flags: int, hardware: bytes, *more: bytes) -> bytes:
        return b"".join(
            (
                _LINK.pack(0, 0, index, flags, flags),
                text(_IFLA_IFNAME, name),
                attribute(_IFLA_ADDRESS, hardware),
                u32(_IFLA_MTU, mtu),
                # By default a queue for every processor, in each direction.
                u32(_IFLA_NUM_TX_QUEUES, 1),
                u32(_IFLA_NUM_RX_QUEUES, 1),
                *more,
            )
        )

    other = end(peer, peer_index, 0, far, u32(_IFLA_NET_NS_FD, namespace))
    kind = nested(
        _IFLA_LINKINFO,
        text(_INFO_KIND, "veth"),
        nested(_INFO_DATA, attribute(_VETH_PEER, other)),
    )
    return _new(
        _NEWLINK, end(name, index, _IFF_UP | _IFF_NOARP, near, kind), f"make veth pair {name}"
    )


def configure_link(index: int, hardware: bytes, mtu: int) -> Message:
    """Give a link what `make_veth` gives its near end, and set it up."""
    flags = _IFF_UP | _IFF_NOARP
    body = _LINK.pack(0, 0, index, flags, flags) + attribute(_IFLA_ADDRESS, hardware)
    return Message(_NEWLINK, body + u32(_IFLA_MTU, mtu), ACK, f"configure link {index}")


def move_link(index: int, name: str, namespace: int) -> Message:
    """Move a link into another namespace. It is down there, and has neither routes nor neighbours.

    Args:
        index: Of the link, which it keeps where no other has that.
        name: By which it is known there; at most 15 characters.
        namespace: File descriptor.
    """
    body = _LINK.pack(0, 0, index, 0, 0) + u32(_IFLA_NET_NS_FD, namespace)
    return Message(_NEWLINK, body + text(_IFLA_IFNAME, name), ACK, f"move link {index}")


def delete_link(name: str) -> Message:
    """Delete a link, and its peer."""
    body = _LINK.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name)
    return Message(_DELLINK, body, ACK, f"delete link {name}")


def set_group(name: str, group: int) -> Message:
    """Put a link into a group."""
    body = _LINK.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name) + u32(_IFLA_GROUP, group)
    return Message(_NEWLINK, body, ACK, f"group of {name}")


def delete_group(group: int) -> Message:
    """Delete the links of a group; a hundred take as long as one."""
    body = _LINK.pack(0, 0, 0, 0, 0) + u32(_IFLA_GROUP, group)
    return Message(_DELLINK, body, ACK, "delete links")


def link_up(index: int) -> Message:
    """Set a link up."""
    return Message(_NEWLINK, _LINK.pack(0, 0, index, _IFF_UP, _IFF_UP), ACK, f"set link {index} up")


def wait_until_up(sock: NetlinkSocket, index: int) -> None:
    """Wait until a link lets packets through, after both ends of its pair are set up.

    The kernel sees to that later, in its own time, and drops packets until then; asking for one link
    makes it do it now, from Linux 6.8 on.

    Raises:
        NetlinkError: It does not come up within a second.
    """
    request = Message(_GETLINK, _LINK.pack(0, 0, index, 0, 0), 0, f"state of link {index}")
    for _ in range(1000):
        (body,) = sock.ask(request)
        if dict(read_attributes(body[_LINK.size :])).get(_IFLA_OPERSTATE) == _OPERSTATE_UP:
            return
        time.sleep(0.001)
    raise NetlinkError(errno.ETIMEDOUT, f"link {index} does not come up")


def add_address(index: int, address: IPv4Address, prefix: int) -> Message:
    """Give a link an address."""
    body = _ADDRESS.pack(_INET, prefix, 0, _SCOPE_UNIVERSE, index)
    packed = address.packed
    return _new(_NEWADDR, body + attribute(1, packed) + attribute(2, packed), f"address {address}")


def add_route(target: IPv4Network, index: int, gateway: IPv4Address | None = None) -> Message:
    """Route a network over a link, to a gateway or to whoever is at its other end."""
    scope = _SCOPE_LINK if gateway is None else _SCOPE_UNIVERSE
    body = _ROUTE.pack(
        _INET, target.prefixlen, 0, 0, _MAIN_TABLE, _STATIC, scope, _UNICAST, 0
    ) + u32(_RTA_OIF, index)
    if target.prefixlen:
        body += attribute(_RTA_DST, target.network_address.packed)
    if gateway is not None:
        body += attribute(_RTA_GATEWAY, gateway.packed)
    return _new(_NEWROUTE, body, f"route to {target}")


def add_neighbour(index: int, address: IPv4Address, hardware: bytes) -> Message:
    """Say for good whose address it is.

    Learned entries of all namespaces share one table of 1,024 by default, which 600 boxes fill;
    permanent ones do not count.
    """
    body = _NEIGHBOUR.pack(_INET, index, _PERMANENT, 0, _UNICAST)
    return _new(
        _NEWNEIGH, body + attribute(1, address.packed) + attribute(2, hardware), f"at {address}"
    )


def link_names(sock: NetlinkSocket) -> dict[str, int]:
    """Return name and index of every link of the socket's namespace."""
    names: dict[str, int] = {}
    for body in sock.ask(Message(_GETLINK, _LINK.pack(0, 0, 0, 0, 0), DUMP, "list links")):
        index = _LINK.unpack_from(body)[2]
        for kind, data in read_attributes(body[_LINK.size :]):
            if kind == _IFLA_IFNAME:
                names[data.rstrip(b"\0").decode()] = index
    return names


def used_networks(sock: NetlinkSocket) -> list[IPv4Network]:
    """Return what the routes of the socket's namespace lead to, the default route left out."""
    found: list[IPv4Network] = []
    request = Message(_GETROUTE, _ROUTE.pack(_INET, 0, 0, 0, 0, 0, 0, 0, 0), DUMP, "list routes")
    for body in sock.ask(request):
        prefix = _ROUTE.unpack_from(body)[1]
        for kind, data in read_attributes(body[_ROUTE.size :]):
            if kind == _RTA_DST and prefix:
                found.append(IPv4Network((data, prefix), strict=False))
    return found

"""Ending connections of a box: what its kernel still sends for it, and what the router remembers."""

import errno
import struct
from ipaddress import IPv4Address

from hadal.node.network.netlink import (
    ACK,
    DUMP,
    Message,
    NetlinkError,
    NetlinkSocket,
    attribute,
    nested,
    u32,
)

__all__ = ["destroy_sockets", "forget_connections"]

_INET, _TCP = 2, 6
_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_DIAG_REQUEST = struct.Struct("=BBBxI48s")
_DIAG_ANSWER = struct.Struct("=4x48s")
_ALL_BUT_LISTENING = 0xFFF & ~(1 << 10 | 1 << 6)  # nor in TIME_WAIT
_CONNTRACK_DELETE = 1 << 8 | 2
_GENERIC = struct.Struct("!BBH")
_TUPLE_ORIGINAL, _FILTER = 1, 25
_TUPLE_IP, _IP_SOURCE = 1, 1
_FILTER_FLAGS, _FLAG_IP_SOURCE = 1, 1


def destroy_sockets() -> None:
    """End all TCP connections of the namespace that the calling thread is in.

    A process that ends leaves the rest of its data to the kernel, which tries to send it for minutes
    once the filter is closed, and keeps the namespace and its link for that long.

    Raises:
        NetlinkError: The kernel refused it, other than by not knowing how.
    """
    sock = NetlinkSocket(_SOCK_DIAG)
    try:
        request = _DIAG_REQUEST.pack(_INET, _TCP, 0, _ALL_BUT_LISTENING, bytes(48))
        for body in sock.ask(Message(_BY_FAMILY, request, DUMP, "list connections")):
            (found,) = _DIAG_ANSWER.unpack_from(body)
            request = _DIAG_REQUEST.pack(_INET, _TCP, 0, _ALL_BUT_LISTENING, found)
            try:
                sock.send([Message(_DESTROY, request, ACK, "end connection")])
            except NetlinkError as error:
                if error.errno != errno.ENOENT:
                    raise
    except NetlinkError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOENT):
            raise
    finally:
        sock.close()


def forget_connections(sock: NetlinkSocket, box: IPv4Address) -> None:
    """Delete what connection tracking knows of a box's connections.

    Args:
        sock: A netfilter socket of the router's namespace.
        box: Who began them.

    Raises:
        NetlinkError: The kernel refused it.
    """
    body = b"".join(
        (
            _GENERIC.pack(_INET, 0, 0),
            nested(_TUPLE_ORIGINAL, nested(_TUPLE_IP, attribute(_IP_SOURCE, box.packed))),
            nested(_FILTER, u32(_FILTER_FLAGS, _FLAG_IP_SOURCE)),
        )
    )
    try:
        sock.send([Message(_CONNTRACK_DELETE, body, ACK, f"forget connections of {box}")])
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise

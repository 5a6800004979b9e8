"""Whether this host can have networks of boxes, found out by making one where it disturbs nothing."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import HadalError
from hadal.node.network import links, namespace
from hadal.node.network.config import NetworkConfig
from hadal.node.network.filter import Filter
from hadal.node.network.netlink import NetlinkSocket
from hadal.node.network.nftables import RuleLibrary

__all__ = ["Finding", "probe"]


@dataclass(frozen=True)
class Finding:
    """One thing that networks of boxes need.

    Attributes:
        what: Its name.
        works: Whether it is there and works.
        detail: What was found.
        hint: What to do where it does not work.
    """

    what: str
    works: bool
    detail: str
    hint: str | None = None


def probe() -> list[Finding]:
    """Try everything that networks need, in namespaces that are gone afterwards; takes about 50 ms."""
    steps: list[tuple[str, Callable[[], str], str]] = [
        ("network namespaces", _namespaces, "run as root with CAP_SYS_ADMIN and CAP_NET_ADMIN"),
        ("veth", _veth, "modprobe veth"),
        ("nftables", _library, "apt-get install nftables, or dnf install nftables"),
        ("packet filter", _filter, "modprobe nf_tables nft_ct nft_nat nft_reject_inet nft_log"),
        ("forwarding", _forwarding, "mount /proc/sys writable for the node daemon"),
    ]
    findings: list[Finding] = []
    for what, step, hint in steps:
        try:
            findings.append(Finding(what, True, step()))
        except (OSError, HadalError) as error:
            reason = error.message if isinstance(error, HadalError) else str(error)
            findings.append(Finding(what, False, reason, hint))
    return findings


def _namespaces() -> str:
    with namespace.new_namespace() as fd:
        pass
    os.close(fd)
    return "can be made"


def _veth() -> str:
    with namespace.new_namespace() as near:
        with namespace.new_namespace() as far:
            pass
        sock = NetlinkSocket(socket.NETLINK_ROUTE)
        pair = links.make_veth(
            "probe",
            "eth0",
            namespace=far,
            near=b"\2\0\0\0\0\1",
            far=b"\2\0\0\0\0\2",
            mtu=1500,
            index=9,
        )
        sock.send([pair])
        sock.close()
    os.close(near)
    os.close(far)
    return "can be made"


def _library() -> str:
    RuleLibrary().close()
    return "is installed"


def _filter() -> str:
    with namespace.new_namespace() as fd:
        Filter(NetworkConfig()).close()
    os.close(fd)
    return "takes the rules"


def _forwarding() -> str:
    path = Path("/proc/sys/net/ipv4/ip_forward")
    if path.read_text().strip() == "1":
        return "is on"
    with path.open("r+"):
        return "is off; the node daemon turns it on"

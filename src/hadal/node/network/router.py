"""The router: the one network namespace between all boxes of a node and its host.

    box 2: eth0 ──── box2 ┐
    machine: file ── box3 ├ router ┤ uplink ── hadal0: host ── the world
    ...                   ┘

The host sees one link and one table, and no box; the router's own table and connections are apart from
the host's. Links of boxes go when their namespaces do, in bulk and in the kernel's own time; deleting
one by hand takes 16 ms (dev/LOG.md).

Everything here blocks. `open` is called in a thread of the host's namespace, which it moves into the
router's; all else is called in threads that are there.
"""

import contextlib
import errno
import fcntl
import os
import socket
from ipaddress import IPv4Network
from pathlib import Path

from hadal.errors import NoCapacityError, NodeError, UnsupportedError
from hadal.node.faults import reach
from hadal.node.network import links, namespace
from hadal.node.network.boxes import hardware_address, hardware_addresses, link_name
from hadal.node.network.config import NetworkConfig
from hadal.node.network.connections import destroy_sockets
from hadal.node.network.netlink import Message, NetlinkError, NetlinkSocket
from hadal.node.network.nftables import RuleLibrary
from hadal.node.network.ruleset import UPLINK, host_ruleset
from hadal.node.network.taps import LENT_TAP, leave_tap, make_tap

__all__ = ["Router"]

_UPLINK_INDEX, _FIRST_INDEX, _FIRST_FAR_INDEX = 999, 1000, 1 << 24
_DYING_GROUP = 0x68640000
_ANYWHERE = IPv4Network("0.0.0.0/0")
_SETTINGS = {
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv4/ip_forward": "1",
    "net/ipv4/icmp_ratelimit": "0",  # a refusal comes at once, every time
}


def _set(name: str, value: str) -> None:
    """Write a setting of the calling thread's namespace, unless it has that value."""
    path = Path("/proc/sys", name)
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except FileNotFoundError:
        if not name.startswith("net/ipv6/"):
            raise


class Router:
    """See the module. One at a time for each `name`.

    Args:
        config: Settings.
    """

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._directory = config.directory / config.name
        self._kept = self._directory / "router"
        self._lock = -1
        self._host = -1
        self._namespace = -1
        self._routes: NetlinkSocket | None = None
        self._library: RuleLibrary | None = None

    @property
    def namespace(self) -> int:
        """File descriptor of its namespace."""
        return self._namespace

    def open(self) -> None:
        """Find the router of an earlier daemon, or make one, and connect it with the host.

        Raises:
            NodeError: Another daemon has it.
            UnsupportedError: The host cannot have networks of boxes.
        """
        try:
            self._lock_directory()
            self._host = namespace.current()
            self._library = RuleLibrary()
            self._open_namespace()
            self._connect_host(self._library)
            namespace.enter(self._namespace)
            self._routes = NetlinkSocket(socket.NETLINK_ROUTE)
        except PermissionError as error:
            raise UnsupportedError(
                f"networks of boxes cannot be made: {error}",
                hint="run the node daemon as root with CAP_NET_ADMIN and CAP_SYS_ADMIN",
            ) from error
        except OSError as error:
            raise UnsupportedError(
                f"networks of boxes cannot be made: {error}",
                hint="the kernel needs network namespaces, veth and nftables: modprobe veth nf_tables",
            ) from error

    def _lock_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = -1
            raise NodeError(
                f"another node daemon has the network {self._config.name!r} of {self._directory}",
                hint="give this one another name, or end the other",
            ) from error

    def _open_namespace(self) -> None:
        try:
            self._namespace = os.open(self._kept, os.O_RDONLY | os.O_CLOEXEC)
            with namespace.entered(self._namespace):
                return
        except OSError:
            # Nothing there, or a file without its mount: the machine was started anew.
            if self._namespace >= 0:
                os.close(self._namespace)
            namespace.release(self._kept)
        with namespace.new_namespace() as self._namespace:
            for name, value in _SETTINGS.items():
                _set(name, value)
            sock = NetlinkSocket(socket.NETLINK_ROUTE)
            sock.send(
                [
                    links.link_up(links.LOOPBACK_IDX),
                    links.add_address(links.LOOPBACK_IDX, self._config.resolver, 32),
                ]
            )
            sock.close()
        reach("network: router made")
        namespace.keep(self._namespace, self._kept)
        reach("network: router kept")

    @property
    def _host_link(self) -> str:
        return f"{self._config.name}0"

    def _connect_host(self, library: RuleLibrary) -> None:
        sock = NetlinkSocket(socket.NETLINK_ROUTE)
        done = self._directory / "uplink"  # written when the link is as it should be
        there = self._host_link in links.link_names(sock)
        if there and done.exists():
            pair = IPv4Network(done.read_text())
        else:
            done.unlink(missing_ok=True)
            if there:
                sock.send([links.delete_link(self._host_link)])
            pair = self._free_pair(links.used_networks(sock))
            self._make_uplink(sock, pair)
            reach("network: uplink up")
            done.write_text(str(pair))
        sock.close()
        _set("net/ipv4/ip_forward", "1")
        library.run(
            self._delete_table() + host_ruleset(self._config.name, self._host_link, pair[1])
        )

    def _free_pair(self, used: list[IPv4Network]) -> IPv4Network:
        for pair in IPv4Network(self._config.uplinks).subnets(new_prefix=31):
            if not any(pair.overlaps(network) for network in used):
                return pair
        raise NodeError(
            f"network: uplinks: all of {self._config.uplinks} is in use on this host",
            hint="configure another private range",
        )

    def _make_uplink(self, sock: NetlinkSocket, pair: IPv4Network) -> None:
        above, below = hardware_address(0, 0), hardware_address(0, 1)
        with namespace.entered(self._namespace):
            inside = NetlinkSocket(socket.NETLINK_ROUTE)
        inside.send(
            [
                links.make_veth(
                    UPLINK, self._host_link, namespace=self._host, near=below, far=above,
                    mtu=self._config.mtu, index=_UPLINK_INDEX,
                )
            ]
        )  # fmt: skip
        reach("network: uplink made")
        outer = links.link_names(sock)[self._host_link]
        sock.send(
            [
                links.link_up(outer),
                links.add_address(outer, pair[0], 31),
                links.add_neighbour(outer, pair[1], below),
            ]
        )
        inside.send(
            [
                links.add_address(_UPLINK_INDEX, pair[1], 31),
                links.add_neighbour(_UPLINK_INDEX, pair[0], above),
                links.add_route(_ANYWHERE, _UPLINK_INDEX, pair[0]),
            ]
        )
        links.wait_until_up(inside, _UPLINK_INDEX)
        inside.close()

    def make_box(self, number: int) -> int | None:
        """Make the network of a box: a namespace with loopback and eth0, both up.

        Returns:
            File descriptor of the namespace; None where the number is still in use.

        Raises:
            NoCapacityError: The kernel has no room for another.
        """
        assert self._routes is not None
        index, far_index = _FIRST_INDEX + number, _FIRST_FAR_INDEX + number
        address = self._config.address(number)
        gateway, (near, far) = self._config.resolver, hardware_addresses(number)
        try:
            with namespace.new_namespace() as box:
                # No IPv6 but on loopback. Before the link is there: it takes its settings from here.
                _set("net/ipv6/conf/default/disable_ipv6", "1")
                self._routes.send(
                    [
                        links.make_veth(
                            link_name(number), "eth0", namespace=box, near=near, far=far,
                            mtu=self._config.mtu, index=index, peer_index=far_index,
                        )
                    ]
                )  # fmt: skip
                reach("network: link of a box made")
                inside = NetlinkSocket(socket.NETLINK_ROUTE)
                inside.send(
                    [
                        links.link_up(links.LOOPBACK_IDX),
                        links.link_up(far_index),
                        links.add_address(far_index, address, 32),
                        links.add_neighbour(far_index, gateway, near),
                        links.add_route(IPv4Network(gateway), far_index),
                        links.add_route(_ANYWHERE, far_index, gateway),
                    ]
                )
                inside.close()
                self._routes.send(
                    [
                        links.add_route(IPv4Network(address), index),
                        links.add_neighbour(index, address, far),
                    ]
                )
                links.wait_until_up(self._routes, index)
        except NetlinkError as error:
            if error.errno == errno.EEXIST:
                return None
            raise NoCapacityError(f"no network for another box: {error}") from error
        except OSError as error:
            raise NoCapacityError(f"no network for another box: {error}") from error
        return box

    def make_tap(self, number: int) -> int | None:
        """Make the network of a virtual machine: a link in the router, whose other end is a file.

        Returns:
            That; None where the number is still in use.

        Raises:
            UnsupportedError: This kernel has no such links.
            NoCapacityError: The kernel has no room for another.
        """
        assert self._routes is not None
        try:
            tap = make_tap(link_name(number), _FIRST_INDEX + number)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EEXIST):
                return None
            raise UnsupportedError(
                f"no network for a virtual machine: {error}", hint="modprobe tun"
            ) from error
        try:
            self._connect_tap(number)
        except NetlinkError as error:
            os.close(tap)
            raise NoCapacityError(f"no network for another box: {error}") from error
        return tap

    def _connect_tap(self, number: int) -> None:
        """Give the link of a virtual machine what belongs to it."""
        assert self._routes is not None
        index, address = _FIRST_INDEX + number, self._config.address(number)
        near, far = hardware_addresses(number)
        self._routes.send(
            [
                links.configure_link(index, near, self._config.mtu),
                links.add_route(IPv4Network(address), index),
                links.add_neighbour(index, address, far),
            ]
        )

    def lend_tap(self, number: int, tap: int, owner: int, borrower: int) -> None:
        """Put the link of a virtual machine where a process that knows only its name can open it.

        Args:
            number: Of the network.
            tap: The file at its other end, which is not needed any more.
            owner: Id of the user who may.
            borrower: File descriptor of the namespace in which it is called `LENT_TAP` until it comes back.

        Raises:
            OSError: The kernel refuses it.
        """
        assert self._routes is not None
        leave_tap(tap, owner)
        self._routes.send([links.move_link(_FIRST_INDEX + number, LENT_TAP, borrower)])

    def fetch_tap(self, number: int, borrower: int) -> None:
        """Bring the link of a virtual machine back, whoever has opened it.

        Raises:
            OSError: The kernel refuses it, or it is gone.
        """
        with namespace.entered(borrower):
            sock = NetlinkSocket(socket.NETLINK_ROUTE)
        with contextlib.closing(sock):
            sock.send([links.move_link(_FIRST_INDEX + number, link_name(number), self._namespace)])
        self._connect_tap(number)

    def end_box(self, number: int, box: int | None) -> None:
        """End the network of a box.

        Args:
            number: Of the network.
            box: File descriptor of its namespace, which is closed; None where another daemon made it, or
                it is that of a virtual machine.
        """
        if box is None:
            self.delete_links({link_name(number)})
            return
        try:
            with namespace.entered(box):
                destroy_sockets()
        finally:
            os.close(box)

    def resolver_sockets(self) -> tuple[socket.socket, socket.socket]:
        """Return sockets for questions, over UDP and TCP."""
        address = (str(self._config.resolver), 53)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        udp.bind(address)
        tcp = socket.create_server(address, backlog=256)
        for sock in (udp, tcp):
            sock.setblocking(False)
        return udp, tcp

    def box_links(self) -> set[str]:
        """Return the names of the links of boxes."""
        assert self._routes is not None
        return set(links.link_names(self._routes)) - {"lo", UPLINK}

    def delete_links(self, names: set[str]) -> None:
        """Delete links, all at once."""
        assert self._routes is not None
        for name in names:
            self._send_if_there(self._routes, links.set_group(name, _DYING_GROUP))
        if names:
            self._send_if_there(self._routes, links.delete_group(_DYING_GROUP))

    @staticmethod
    def _send_if_there(sock: NetlinkSocket, message: Message) -> None:
        try:
            sock.send([message])
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise

    def _delete_table(self) -> str:
        return f"table inet {self._config.name} {{ }}\ndelete table inet {self._config.name}\n"

    def close(self, *, remove: bool) -> None:
        """Let go of the router; `remove` it where no box uses it, with all that it has on the host."""
        if remove and self._lock >= 0 and self._library is not None:
            with namespace.entered(self._host):
                host = NetlinkSocket(socket.NETLINK_ROUTE)
                self._send_if_there(host, links.delete_link(self._host_link))
                host.close()
                reach("network: uplink deleted")
                self._library.run(self._delete_table())
            reach("network: table deleted")
            namespace.release(self._kept)
            reach("network: router released")
            (self._directory / "uplink").unlink(missing_ok=True)
        if self._library is not None:
            self._library.close()
            self._library = None
        if self._routes is not None:
            self._routes.close()
            self._routes = None
        for fd in (self._namespace, self._host, self._lock):
            if fd >= 0:
                os.close(fd)
        self._namespace = self._host = self._lock = -1

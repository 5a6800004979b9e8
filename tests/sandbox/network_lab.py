"""A small internet for tests: namespaces of their own for the world, for the node and for each box.

    boxes ── router ── node (198.51.100.1; a service of its own on port 8080) ── world

The world has servers on many addresses, a resolver among them. Everything runs in one process; a socket
stays in the namespace where it was made.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import subprocess
import time

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from hadal.node.network import NetworkConfig, NetworkManager, namespace

needs_network = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(program) for program in ("nft", "ip", "unshare")),
    reason="networks of boxes need root, and their tests the programs nft, ip and unshare",
)

WEB = "203.0.113.10"
OTHER = "203.0.113.20"
PRIVATE = "10.9.9.9"
METADATA = "169.254.169.254"
NODE = "198.51.100.1"
ADDRESSES = (WEB, OTHER, "203.0.113.30", PRIVATE, METADATA, "192.0.2.1")
TCP_PORTS = (22, 80, 443, 5432)
UDP_PORT = 5000


class Zone(asyncio.DatagramProtocol):
    """The resolver of the world: A records with a TTL, and aliases."""

    def __init__(self):
        self.records = {
            "web.test": ("A", 300, [WEB]),
            "other.test": ("A", 300, [OTHER]),
            "brief.test": ("A", 1, [WEB]),
            "a.wild.test": ("A", 300, ["203.0.113.30"]),
            "b.a.wild.test": ("A", 300, [OTHER]),
            "alias.test": ("CNAME", 20, "cdn.test"),
            "cdn.test": ("CNAME", 30, "edge.test"),
            "edge.test": ("A", 300, [OTHER]),
            "rebound.test": ("A", 300, [PRIVATE]),
            "half.test": ("A", 300, [WEB, PRIVATE]),
            "meta.test": ("A", 300, [METADATA]),
            "large.test": ("A", 300, [f"203.0.113.{n}" for n in range(100, 220)]),
            "text.test": ("TXT", 300, ['"hello"']),
        }
        self.asked = []
        self.silent = set()

    def reply(self, wire, limit):
        query = dns.message.from_wire(wire)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append(name)
        if name in self.silent or name.partition(".")[2] in self.silent:
            return None
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.NOERROR if name in self.records else dns.rcode.NXDOMAIN)
        while name in self.records:
            kind, ttl, data = self.records[name]
            values = [f"{data}."] if kind == "CNAME" else data
            response.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", kind, *values))
            name = data if kind == "CNAME" else None
        return response.to_wire(max_size=limit, prefer_truncation=True)

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        if (reply := self.reply(data, 1232)) is not None:
            self.transport.sendto(reply, addr)

    async def serve(self, reader, writer):
        with contextlib.suppress(EOFError):
            length = int.from_bytes(await reader.readexactly(2), "big")
            reply = self.reply(await reader.readexactly(length), 65535)
            writer.write(len(reply).to_bytes(2, "big") + reply)
            await writer.drain()
        writer.close()


class Echo(asyncio.DatagramProtocol):
    """Sends back what it gets, and remembers who sent it."""

    def __init__(self):
        self.peers = []
        self.writers = set()

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.peers.append(addr[0])
        self.transport.sendto(data, addr)

    async def serve(self, reader, writer):
        self.peers.append(writer.get_extra_info("peername")[0])
        self.writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        self.writers.discard(writer)
        writer.close()


def run_in(fd, *commands):
    with namespace.entered(fd):
        for command in commands:
            subprocess.run(command.split(), check=True)


def socket_in(fd, kind=socket.SOCK_STREAM, *, family=socket.AF_INET, bind=None):
    with namespace.entered(fd):
        sock = socket.socket(family, kind)
    sock.setblocking(False)
    if bind:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(bind)
        if kind == socket.SOCK_STREAM:
            sock.listen(100)
    return sock


class Lab:
    """The world and the node; `manager` runs in the node."""

    def __init__(self, directory):
        self.directory = directory
        self.zone = Zone()
        self.echo = Echo()
        self.started = []
        with namespace.new_namespace() as self.world, namespace.new_namespace() as self.node:
            pass
        run_in(
            self.node,
            "ip link set lo up",
            "ip link add eth0 type veth peer name world",
        )
        self._move(self.node, "world", self.world)
        run_in(self.node, f"ip addr add {NODE}/24 dev eth0", "ip link set eth0 up")
        run_in(
            self.world,
            "ip link set lo up",
            *(f"ip addr add {address}/32 dev lo" for address in ADDRESSES),
            "ip addr add 198.51.100.2/24 dev world",
            "ip link set world up",
        )
        run_in(self.node, "ip route add default via 198.51.100.2")

    def _move(self, source, link, target):
        with namespace.entered(source):
            subprocess.run(
                ["ip", "link", "set", link, "netns", f"/proc/{os.getpid()}/fd/{target}"], check=True
            )

    def config(self, **changes):
        settings = {
            "name": "lab",
            "directory": self.directory,
            "upstreams": ("192.0.2.1",),
            "pool": 2,
            "upstream_timeout_s": 0.5,
        }
        return NetworkConfig(**settings | changes)

    def in_router(self, *command):
        """Return what a command in the router's namespace writes."""
        router = os.open(self.directory / "lab" / "router", os.O_RDONLY)
        try:
            with namespace.entered(router):
                return subprocess.run(command, check=True, capture_output=True, text=True).stdout
        finally:
            os.close(router)

    async def start(self):
        loop = asyncio.get_running_loop()
        for fd, ports in ((self.world, TCP_PORTS), (self.node, (8080,))):
            for port in ports:
                sock = socket_in(fd, bind=("0.0.0.0", port))
                self.started.append(await asyncio.start_server(self.echo.serve, sock=sock))
        for address in ADDRESSES:
            sock = socket_in(self.world, socket.SOCK_DGRAM, bind=(address, UDP_PORT))
            transport, _ = await loop.create_datagram_endpoint(Echo, sock=sock)
            self.started.append(transport)
        bind = ("192.0.2.1", 53)
        sock = socket_in(self.world, bind=bind)
        self.started.append(await asyncio.start_server(self.zone.serve, sock=sock))
        sock = socket_in(self.world, socket.SOCK_DGRAM, bind=bind)
        self.started.append((await loop.create_datagram_endpoint(lambda: self.zone, sock=sock))[0])

    async def stop(self):
        for writer in list(self.echo.writers):
            writer.close()
        for server in self.started:
            server.close()
        await asyncio.sleep(0)

    def close(self):
        for kept in self.directory.glob("*/router"):  # of a test that failed
            namespace.release(kept)
        os.close(self.world)
        os.close(self.node)


class Box:
    """What a process in a box would do."""

    def __init__(self, network):
        self.network = network
        self.fd = os.open(network.path, os.O_RDONLY)

    def close(self):
        os.close(self.fd)

    def socket(self, kind=socket.SOCK_STREAM, **options):
        return socket_in(self.fd, kind, **options)

    async def connect(self, address, port):
        sock = self.socket()
        try:
            async with asyncio.timeout(3):
                await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def reach(self, address, port=443):
        """Return "ok", or the name of the error, which must come within 100 ms."""
        began = time.monotonic()
        try:
            sock = await self.connect(address, port)
        except OSError as error:
            assert time.monotonic() - began < 0.1, "refused late"
            return errno.errorcode[error.errno]
        try:
            return await self.echoed(sock)
        finally:
            sock.close()

    async def echoed(self, sock, data=b"ping"):
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(3):
            await loop.sock_sendall(sock, data)
            return "ok" if await loop.sock_recv(sock, 65536) == data else "closed"

    async def datagram(self, address, port=UDP_PORT, data=b"ping"):
        """Return "ok", or the name of the error, which must come within 100 ms."""
        sock = self.socket(socket.SOCK_DGRAM)
        began = time.monotonic()
        try:
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
            return await self.echoed(sock, data)
        except OSError as error:
            assert time.monotonic() - began < 0.1, "refused late"
            return errno.errorcode[error.errno]
        finally:
            sock.close()

    async def ask(self, name, kind="A", *, server=None, tcp=False, timeout_s=3, edns=True):
        """Return the resolver's answer."""
        query = dns.message.make_query(name, kind, use_edns=edns)
        loop = asyncio.get_running_loop()
        sock = self.socket(socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_connect(sock, (server or str(self.network.resolver), 53))
                wire = query.to_wire()
                await loop.sock_sendall(sock, (len(wire).to_bytes(2, "big") if tcp else b"") + wire)
                data = await loop.sock_recv(sock, 65535)
                if not data:
                    raise ConnectionResetError("closed without an answer")
                while tcp and len(data) < 2 + int.from_bytes(data[:2], "big"):
                    data += await loop.sock_recv(sock, 65535)
        finally:
            sock.close()
        response = dns.message.from_wire(data[2:] if tcp else data)
        assert query.is_response(response)
        return response

    async def resolve(self, name, **options):
        """Return the addresses in the answer, or the name of its error."""
        response = await self.ask(name, **options)
        if response.rcode() != dns.rcode.NOERROR:
            return dns.rcode.to_text(response.rcode())
        return [i.address for r in response.answer if r.rdtype == dns.rdatatype.A for i in r]


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "network")
    yield lab
    lab.close()


@pytest.fixture
def with_network(lab):
    """Run a coroutine function with the lab, a manager in its node, and a maker of boxes."""

    def run(body, **changes):
        async def main():
            boxes = []
            await lab.start()
            try:
                async with NetworkManager(lab.config(**changes)) as manager:

                    async def make(policy):
                        boxes.append(Box(await manager.take(policy)))
                        return boxes[-1]

                    try:
                        await body(lab, manager, make)
                    finally:
                        for box in boxes:
                            box.close()
                            await manager.give_back(box.network)
            finally:
                await lab.stop()

        with namespace.entered(lab.node):
            asyncio.run(main())

    return run

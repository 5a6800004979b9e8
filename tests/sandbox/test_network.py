"""Networks of boxes: what is reached, what is refused and how fast, with packets that really go."""

import asyncio
import errno
import os
import socket
import struct
import subprocess
import sys

import pytest

from hadal.errors import ConfigError, NodeError, UnsupportedError
from hadal.node.network import namespace
from hadal.sandbox.network_policy import NetworkPolicy
from tests.sandbox.network_lab import (
    METADATA,
    NODE,
    OTHER,
    PRIVATE,
    UDP_PORT,
    WEB,
    needs_network,
    run_in,
)
from tests.sandbox.network_lab import lab as lab
from tests.sandbox.network_lab import with_network as with_network

pytestmark = needs_network


def test_addresses_ports_and_protocols(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=(f"{WEB}:443/tcp", f"{OTHER}:79-81", f"{WEB}:5000")))
        assert await box.reach(WEB, 443) == "ok"
        assert await box.reach(OTHER, 80) == "ok"
        assert await box.datagram(WEB) == "ok"
        assert await box.reach(WEB, 80) == "ECONNREFUSED"
        assert await box.reach(OTHER, 443) == "ECONNREFUSED"
        assert await box.datagram(OTHER) == "EHOSTUNREACH"
        assert set(lab.echo.peers) == {NODE}
        denied = {d.target: d for d in (await manager.statistics(box.network)).denials}
        assert {f"{WEB}:80/tcp", f"{OTHER}:443/tcp", f"{OTHER}:5000/udp"} <= set(denied)
        assert "does not allow" in denied[f"{WEB}:80/tcp"].reason

    with_network(body)


def test_a_denied_entry_wins(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("203.0.113.0/24",), deny=(f"{OTHER}:443",)))
        assert await box.reach(WEB) == "ok"
        assert await box.reach(OTHER, 443) == "ECONNREFUSED"
        assert await box.reach(OTHER, 80) == "ok"
        box = await make(NetworkPolicy(default="allow", deny=("203.0.113.16/28",)))
        assert await box.reach(WEB) == "ok"
        assert await box.reach(OTHER) == "ECONNREFUSED"

    with_network(body)


def test_the_open_internet_is_not_what_is_private_or_the_nodes(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy.open())
        assert await box.reach(WEB) == "ok"
        assert await box.datagram(OTHER) == "ok"
        assert await box.reach(PRIVATE) == "ECONNREFUSED"
        for address in (NODE, "10.200.255.0", "10.200.255.1", "10.201.0.1"):
            assert await box.reach(address, 8080) == "ECONNREFUSED"
        box = await make(NetworkPolicy(default="allow", allow=(f"{PRIVATE}:443",)))
        assert await box.reach(PRIVATE) == "ok"
        assert await box.reach(PRIVATE, 80) == "ECONNREFUSED"

    with_network(body)


def test_nothing_allows_metadata_other_boxes_or_the_node(with_network):
    async def body(lab, manager, make):
        everything = NetworkPolicy(default="allow", allow=("0.0.0.0/0",))
        box, other = await make(everything), await make(everything)
        assert await box.reach(PRIVATE) == "ok"
        for address in (METADATA, "100.100.100.200", str(other.network.address)):
            assert await box.reach(address) == "ECONNREFUSED"
        assert await box.reach(NODE, 8080) == "ECONNREFUSED"
        assert await box.datagram(str(other.network.address)) == "EHOSTUNREACH"
        listening = other.socket(bind=("0.0.0.0", 443))
        assert await box.reach(str(other.network.address)) == "ECONNREFUSED"
        listening.close()
        reasons = {d.reason for d in (await manager.statistics(box.network)).denials}
        assert len(reasons) == 1
        assert "no policy" in reasons.pop()
        # and nobody outside begins a connection to a box
        run_in(lab.node, f"ip route add {box.network.address} via 10.200.255.1")
        listening = box.socket(bind=("0.0.0.0", 443))
        with namespace.entered(lab.node), pytest.raises(OSError, match=r"refused|timed out"):
            socket.create_connection((str(box.network.address), 443), timeout=0.2)
        listening.close()

    with_network(body)


def test_there_is_no_ipv6_but_on_loopback(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(default="allow", allow=("0.0.0.0/0",)))
        loop = asyncio.get_running_loop()
        for address in ("fd00:ec2::254", "2001:db8::1", "::ffff:169.254.169.254"):
            sock = box.socket(family=socket.AF_INET6)
            with pytest.raises(OSError, match=r"unreachable|failed|assign") as found:
                await loop.sock_connect(sock, (address, 80))
            assert found.value.errno in (errno.ENETUNREACH, errno.ECONNREFUSED)
            sock.close()
        listening = box.socket(family=socket.AF_INET6, bind=("::1", 9000))
        sock = box.socket(family=socket.AF_INET6)
        await loop.sock_connect(sock, ("::1", 9000))
        sock.close()
        listening.close()

    with_network(body)


def spoofed(source, target):
    """An UDP packet, headers included."""
    udp = struct.pack("!HHHH", 4000, UDP_PORT, 12, 0) + b"evil"
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(target),
    )  # fmt: skip
    return header + udp


def test_a_spoofed_source_is_dropped(with_network):
    async def body(lab, manager, make):
        policy = NetworkPolicy(allow=(f"{WEB}:{UDP_PORT}",))
        box, other = await make(policy), await make(policy)
        before = await manager.statistics(other.network)
        with namespace.entered(box.fd):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        for source in (str(other.network.address), "198.51.100.7", "127.0.0.1"):
            raw.sendto(spoofed(source, WEB), (WEB, 0))
        listening = box.socket(socket.SOCK_DGRAM, bind=("0.0.0.0", 4000))
        raw.sendto(spoofed(str(box.network.address), WEB), (WEB, 0))
        await asyncio.sleep(0.05)
        raw.close()
        listening.close()
        assert (await manager.statistics(other.network)) == before
        assert (await manager.statistics(box.network)).sent.packets == 1

    with_network(body)


def test_updates_act_at_once_in_both_directions(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=(f"{WEB}:443",)))
        assert await box.reach(OTHER) == "ECONNREFUSED"
        kept = await box.connect(WEB, 443)
        await manager.update(box.network, NetworkPolicy(allow=("203.0.113.0/24:443",)))
        cut = await box.connect(OTHER, 443)
        assert await box.echoed(cut) == "ok"
        await manager.update(box.network, NetworkPolicy(allow=(f"{WEB}:443",)))
        assert await box.echoed(kept) == "ok"
        with pytest.raises(ConnectionResetError):
            await box.echoed(cut)
        assert await box.reach(OTHER) == "ECONNREFUSED"
        await manager.update(box.network, NetworkPolicy())
        with pytest.raises(ConnectionResetError):
            await box.echoed(kept)
        kept.close()
        cut.close()

    with_network(body)


def test_an_update_cuts_what_only_comes_in(with_network):
    """A box that only listens to an old connection must not go on hearing."""

    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("203.0.113.0/24:443",)))
        sock = await box.connect(WEB, 443)
        assert await box.echoed(sock) == "ok"
        await manager.update(box.network, NetworkPolicy())
        (writer,) = lab.echo.writers
        for _ in range(50):
            writer.write(b"secret")
            await asyncio.sleep(0.01)
            if not lab.echo.writers:
                break
        else:
            pytest.fail("the world's end of the connection has not been reset")
        with pytest.raises(BlockingIOError):
            sock.recv(100)
        sock.close()

    with_network(body)


def test_named_services(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("mirror",)))
        assert await box.resolve("web.test") == [WEB]
        assert await box.reach(WEB, 443) == "ok"
        assert await box.reach(WEB, 80) == "ECONNREFUSED"
        assert await box.resolve("rebound.test") == [PRIVATE]
        assert await box.reach(PRIVATE, 80) == "ok"
        assert await box.resolve("other.test") == "REFUSED"
        box = await make(NetworkPolicy(default="allow", deny=("mirror",)))
        assert await box.resolve("web.test") == "REFUSED"
        assert await box.resolve("other.test") == [OTHER]

    mirror = ("web.test:443", "rebound.test", f"{PRIVATE}:80")
    with_network(body, services={"mirror": mirror})


def test_whoever_stops_waiting_leaves_nothing_behind(with_network):
    """Takers and changers that are cancelled anywhere: in the end there is nothing, and all still works."""

    async def body(lab, manager, make):
        async def use(number):
            network = await manager.take(NetworkPolicy(allow=(f"192.0.2.{number}",)))
            try:
                for n in range(5):
                    await manager.update(network, NetworkPolicy(allow=(f"198.18.{number}.{n}",)))
            finally:
                await asyncio.shield(asyncio.ensure_future(manager.give_back(network)))

        for _ in range(3):
            users = [asyncio.create_task(use(number)) for number in range(30)]
            for n, user in enumerate(users):
                asyncio.get_running_loop().call_later(n * 0.001, user.cancel)
            await asyncio.wait(users)
        box = await make(NetworkPolicy(allow=(WEB,)))
        assert await box.reach(WEB) == "ok"
        await asyncio.sleep(0.1)
        table = lab.in_router("nft", "-n", "list", "set", "inet", "hadal", "boxes")
        assert table.count('"box') == 1
        chains = lab.in_router("nft", "list", "chains").count("chain policy_")
        assert chains <= 65

    with_network(body)


def echo_request():
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"hello"
    words = struct.unpack(f"!{len(body + body[:1]) // 2}H", body + b"\0" * (len(body) % 2))
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]


def test_pings_and_fragments(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=(WEB, f"{OTHER}:{UDP_PORT}")))
        assert await box.datagram(WEB, data=b"x" * 9000) == "ok"
        assert await box.datagram(OTHER, data=b"x" * 9000) == "ok"
        loop = asyncio.get_running_loop()
        with namespace.entered(box.fd):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        raw.setblocking(False)
        for address, answer in ((WEB, 0), (OTHER, 3)):  # echo reply, unreachable
            await loop.sock_sendto(raw, echo_request(), (address, 0))
            async with asyncio.timeout(1):
                assert (await loop.sock_recv(raw, 200))[20] == answer
        raw.close()
        targets = {d.target for d in (await manager.statistics(box.network)).denials}
        assert targets == {f"{OTHER}/icmp"}

    with_network(body)


def test_statistics_count_what_went(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=(WEB,)))
        assert await box.datagram(WEB, data=b"x" * 1000) == "ok"
        assert await box.datagram(OTHER, data=b"x" * 1000) == "EHOSTUNREACH"
        statistics = await manager.statistics(box.network)
        for tally in (statistics.sent, statistics.received, statistics.rejected):
            assert (tally.packets, tally.bytes) == (1, 1028)

    with_network(body)


def test_a_flood_of_denials_is_bounded(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy())
        for port in range(101, 400):
            assert await box.reach(WEB, port) == "ECONNREFUSED"
        statistics = await manager.statistics(box.network)
        assert statistics.rejected.packets == 299
        assert len(statistics.denials) == 16

    with_network(body, denials_max=16)


def test_a_box_cannot_have_all_connections(with_network):
    async def body(lab, manager, make):
        box, other = await make(NetworkPolicy.open()), await make(NetworkPolicy.open())
        open_ = [await box.connect(WEB, 443) for _ in range(20)]
        assert await box.reach(WEB) == "ECONNREFUSED"
        assert await other.reach(WEB) == "ok"
        for sock in open_:
            sock.close()

    with_network(body, connections_max=20)


def test_without_a_network(with_network):
    async def body(lab, manager, make):
        none = await manager.take(NetworkPolicy.none())
        assert (none.path, none.address, none.resolv_conf) == (None, None, b"")
        with pytest.raises(UnsupportedError, match="given to a box that runs"):
            await manager.update(none, NetworkPolicy())
        assert (await manager.statistics(none)).sent.packets == 0
        await manager.give_back(none)
        box = await make(NetworkPolicy())
        with pytest.raises(UnsupportedError, match="taken from it"):
            await manager.update(box.network, NetworkPolicy.none())
        with pytest.raises(ConfigError, match="'nosuch' is unknown on this node; it knows crates"):
            await manager.take(NetworkPolicy(allow=("nosuch",)))
        with pytest.raises(ConfigError, match="'pypi' is not configured"):
            await manager.update(box.network, NetworkPolicy(allow=("pypi",)))

    with_network(body)


def links_and_rules(lab):
    with namespace.entered(lab.node):
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
        rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True)
    return len(links.stdout.splitlines()), rules.stdout


def test_nothing_is_left(lab, with_network):
    before = links_and_rules(lab)

    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("web.test", WEB)))
        network = box.network
        await box.resolve("web.test")
        sock = await box.connect(WEB, 443)
        box.close()
        box.fd = os.open("/dev/null", os.O_RDONLY)
        await manager.give_back(network)
        await manager.give_back(network)
        with pytest.raises(NodeError, match="given back"):
            await manager.update(network, NetworkPolicy())
        rules = lab.in_router("nft", "list", "table", "inet", "hadal")
        connections = lab.in_router("cat", "/proc/net/nf_conntrack")
        in_sets = rules.split("set question_rate")[0]  # those after it forget by themselves
        assert str(network.address) not in in_sets
        assert "policies" in in_sets
        assert str(network.address) not in connections
        with pytest.raises(OSError, match=r"abort|reset|pipe"):
            await box.echoed(sock)
        sock.close()
        for _ in range(100):
            links = lab.in_router("ip", "-o", "link")
            if f"box{network.number}@" not in links:
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail(f"the link is still there: {links}")

    with_network(body)
    assert links_and_rules(lab) == before
    assert [p.name for p in (lab.directory / "lab").iterdir()] == ["lock"]


_OPENS_A_LINK = """
import fcntl, os, struct, sys
tap = os.open("/dev/net/tun", os.O_RDWR)  # a jail has a device of its own, which its user may open
os.setresuid(4321, 4321, 4321)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x0002 | 0x1000 | 0x4000))
fcntl.ioctl(tap, 0x400454D8, struct.pack("i", 12))
print("open", flush=True)
frame = bytes.fromhex(sys.stdin.readline())
os.write(tap, bytes(12) + frame)
while True:
    got = os.read(tap, 4096)[12:]
    if got[12:14] == b"\\x08\\x00" and got[23] == 17:
        print(got[42:].decode(), flush=True)
        break
"""


def _udp_frame(network, target, port, text):
    """A datagram as a machine sends it, with the link's addresses before it."""
    near, far = network.hardware
    udp = struct.pack("!HHHH", 40000, port, 8 + len(text), 0) + text
    addresses = network.address.packed + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]
    return near + far + b"\x08\x00" + head + udp


def test_a_link_that_was_opened_by_its_name_leads_on_when_it_is_back(with_network):
    """As Firecracker has it, which takes no open file."""

    async def body(lab, manager, make):
        policy = NetworkPolicy(allow=(f"{WEB}:{UDP_PORT}/udp",))
        network = await manager.take(policy, machine=True)
        with namespace.new_namespace() as elsewhere:
            await manager.lend_tap(network, 4321, elsewhere)
        opener = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/proc/{os.getpid()}/fd/{elsewhere}", sys.executable, "-c", _OPENS_A_LINK,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert await asyncio.wait_for(opener.stdout.readline(), 10) == b"open\n"
            await manager.fetch_tap(network, elsewhere)
            with namespace.entered(elsewhere):
                assert socket.if_nameindex() == [(1, "lo")]
            frame = _udp_frame(network, WEB, UDP_PORT, b"hello")
            opener.stdin.write(frame.hex().encode() + b"\n")
            assert b"hello" in await asyncio.wait_for(opener.stdout.readline(), 10)
        finally:
            os.close(elsewhere)
            os.close(network.tap)
            opener.kill()
            await opener.wait()
            await manager.give_back(network)

    with_network(body)

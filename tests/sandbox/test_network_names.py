"""Names in boxes: who is answered what, and that the filter opens for exactly that."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import dns.edns
import dns.message
import dns.rcode
import pytest

from hadal.node.network import resolver
from hadal.node.network.shares import Shares
from hadal.sandbox.network_policy import NetworkPolicy
from tests.sandbox.conftest import names
from tests.sandbox.network_lab import METADATA, OTHER, PRIVATE, WEB, needs_network
from tests.sandbox.network_lab import lab as lab
from tests.sandbox.network_lab import with_network as with_network

pytestmark = needs_network


def test_an_allowed_name_opens_its_addresses(with_network):
    async def body(lab, manager, make):
        box, other = (
            await make(NetworkPolicy(allow=("web.test:443/tcp",))),
            await make(NetworkPolicy(allow=("web.test:443/tcp",))),
        )
        assert await box.reach(WEB) == "ECONNREFUSED"
        assert await box.resolve("WEB.test") == [WEB]
        assert await box.reach(WEB) == "ok"
        assert await box.reach(WEB, 80) == "ECONNREFUSED"
        assert await box.datagram(WEB) == "EHOSTUNREACH"
        assert await box.reach(OTHER) == "ECONNREFUSED"
        assert await other.reach(WEB) == "ECONNREFUSED"  # it has not asked

    with_network(body)


def test_a_name_without_a_port_opens_all(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("web.test",)))
        await box.resolve("web.test")
        assert await box.reach(WEB, 80) == "ok"
        assert await box.datagram(WEB) == "ok"

    with_network(body)


def test_other_names_are_refused_and_never_asked_for(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("web.test",)))
        response = await box.ask("secret-data.other.test")
        assert response.rcode() == dns.rcode.REFUSED
        (error,) = [o for o in response.options if isinstance(o, dns.edns.EDEOption)]
        assert error.code == dns.edns.EDECode.PROHIBITED
        assert await box.resolve("secret-data.other.test", edns=False) == "REFUSED"
        assert await box.resolve("nowhere.test") == "REFUSED"
        assert lab.zone.asked == []
        statistics = await manager.statistics(box.network)
        assert (statistics.questions, statistics.questions_refused) == (3, 3)
        assert statistics.denials[0].target == "secret-data.other.test"
        assert statistics.denials[0].count == 2
        assert "this name" in statistics.denials[0].reason

    with_network(body)


def test_wildcards(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("*.wild.test:443",), deny=("b.a.wild.test",)))
        assert await box.resolve("a.wild.test") == ["203.0.113.30"]
        assert await box.reach("203.0.113.30") == "ok"
        assert await box.resolve("b.a.wild.test") == "REFUSED"
        assert await box.resolve("wild.test") == "REFUSED"
        assert await box.resolve("none.wild.test") == "NXDOMAIN"

    with_network(body)


def test_aliases_are_followed(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("alias.test:443",)))
        response = await box.ask("alias.test")
        assert [r.name.to_text() for r in response.answer] == [
            "alias.test.",
            "cdn.test.",
            "edge.test.",
        ]
        assert await box.reach(OTHER) == "ok"
        assert await box.resolve("edge.test") == "REFUSED"
        denying = await make(NetworkPolicy(default="allow", deny=("cdn.test",)))
        assert await denying.resolve("alias.test") == "REFUSED"

    with_network(body)


def test_names_do_not_lead_inside(with_network):
    async def body(lab, manager, make):
        for policy in (NetworkPolicy(allow=("*.test",)), NetworkPolicy.open()):
            box = await make(policy)
            for name in ("rebound.test", "half.test", "meta.test"):
                assert await box.resolve(name) == "REFUSED"
            assert await box.reach(PRIVATE) == "ECONNREFUSED"
            reasons = {d.reason for d in (await manager.statistics(box.network)).denials}
            assert any("a name cannot allow" in reason for reason in reasons)
        allow = ("*.test", f"{PRIVATE}:443", f"{METADATA}:80")
        box = await make(NetworkPolicy(allow=allow))
        assert await box.resolve("rebound.test") == [PRIVATE]
        assert await box.reach(PRIVATE, 443) == "ok"
        assert await box.resolve("meta.test") == "REFUSED"
        assert await box.reach(METADATA, 80) == "ECONNREFUSED"

    with_network(body)


def test_an_address_is_closed_after_its_time_but_connections_stay(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("brief.test:443",)))
        assert await box.resolve("brief.test") == [WEB]
        sock = await box.connect(WEB, 443)
        assert await box.echoed(sock) == "ok"
        await asyncio.sleep(0.6)
        assert await box.resolve("brief.test") == [WEB]  # renews it
        await asyncio.sleep(0.6)
        assert await box.reach(WEB) == "ok"
        await asyncio.sleep(0.6)
        assert await box.reach(WEB) == "ECONNREFUSED"
        assert await box.echoed(sock) == "ok"
        sock.close()

    with_network(body, names_held_s=0.1)


def test_updates_keep_connections_of_names_that_stay(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("web.test:443", "other.test")))
        await box.resolve("web.test")
        await box.resolve("other.test")
        kept, cut = await box.connect(WEB, 443), await box.connect(OTHER, 443)
        await manager.update(box.network, NetworkPolicy(allow=("web.test",)))
        assert await box.echoed(kept) == "ok"
        assert await box.reach(WEB, 80) == "ok"
        with pytest.raises(ConnectionResetError):
            await box.echoed(cut)
        assert await box.reach(OTHER) == "ECONNREFUSED"
        assert await box.resolve("other.test") == "REFUSED"
        await manager.update(box.network, NetworkPolicy())
        with pytest.raises(ConnectionResetError):
            await box.echoed(kept)
        kept.close()
        cut.close()

    with_network(body)


def test_no_other_resolver_is_reached(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(default="allow", deny=("other.test",)))
        assert await box.resolve("web.test", server="192.0.2.1") == [WEB]
        assert await box.resolve("other.test", server="192.0.2.1") == "REFUSED"
        assert await box.resolve("other.test", server=WEB, tcp=True) == "REFUSED"

    with_network(body)


def test_kinds_of_questions(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("*.test",)))
        for kind in ("AAAA", "HTTPS"):
            response = await box.ask("web.test", kind)
            assert (response.rcode(), response.answer) == (dns.rcode.NOERROR, [])
        assert (await box.ask("web.test", "ANY")).rcode() == dns.rcode.NOTIMP
        assert '"hello"' in str((await box.ask("text.test", "TXT")).answer[0])
        assert (await box.ask("10.113.0.203.in-addr.arpa", "PTR")).rcode() == dns.rcode.REFUSED
        response = await box.ask("large.test")
        assert response.flags & 0x0200  # truncated
        assert len(await box.resolve("large.test", tcp=True)) == 120

    with_network(body)


def test_what_is_no_question_is_left(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("*.test",)))
        sock = box.socket(socket.SOCK_DGRAM)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (str(box.network.resolver), 53))
        for data in (b"", b"x", b"\0" * 11, b"\xff" * 600, b"\0\1\x80" + b"\0" * 9):
            await loop.sock_sendall(sock, data)
        sock.close()
        assert await box.resolve("web.test") == [WEB]

    with_network(body)


def test_a_silent_upstream_holds_up_nobody_else(with_network):
    async def body(lab, manager, make):
        lab.zone.silent.add("silent.test")
        box, other = await make(NetworkPolicy.open()), await make(NetworkPolicy.open())
        waiting = [asyncio.create_task(box.resolve("silent.test", timeout_s=5)) for _ in range(64)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        assert await other.resolve("web.test") == [WEB]
        assert time.monotonic() - began < 0.1
        with pytest.raises(TimeoutError):  # it has as many open as it may
            await box.resolve("web.test", timeout_s=0.1)
        assert set(await asyncio.gather(*waiting)) == {"SERVFAIL"}
        assert await box.resolve("web.test") == [WEB]

    with_network(body, upstream_timeout_s=0.25)


def test_a_box_cannot_hold_the_resolver_by_streams(with_network):
    async def body(lab, manager, make):
        box, other = await make(NetworkPolicy.open()), await make(NetworkPolicy.open())
        held = [await box.connect(str(box.network.resolver), 53) for _ in range(20)]
        assert await other.resolve("web.test", tcp=True) == [WEB]
        with pytest.raises(ConnectionResetError):
            await box.resolve("web.test", tcp=True)
        assert await box.resolve("web.test") == [WEB]
        for sock in held:
            sock.close()
        await asyncio.sleep(0.05)
        assert await box.resolve("web.test", tcp=True) == [WEB]

    with_network(body)


def test_boxes_that_wait_for_a_silent_upstream_leave_room_for_others(with_network, monkeypatch):
    """All of them together: thousands of questions whose answer never comes, and streams that say nothing."""
    monkeypatch.setattr(resolver, "_ALL_PENDING_MAX", 256)
    monkeypatch.setattr(resolver, "_ALL_STREAMS_MAX", 64)

    async def body(lab, manager, make):
        lab.zone.silent.add("silent.test")
        hostile = [await make(NetworkPolicy.open()) for _ in range(12)]
        other = await make(NetworkPolicy.open())
        address = (str(other.network.resolver), 53)
        held, sent, loop = [], 0, asyncio.get_running_loop()
        files = len(names(Path("/proc/self/fd")))

        async def flood(box):
            nonlocal sent
            sock = box.socket(socket.SOCK_DGRAM)
            held.append(sock)
            await loop.sock_connect(sock, address)
            for _ in range(20):
                held.append(stream := box.socket())
                stream.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    stream.connect(address)
            for number in range(400):
                query = dns.message.make_query(f"{number}.silent.test", "A")
                with contextlib.suppress(BlockingIOError):
                    sock.send(query.to_wire())
                    sent += 1
                await asyncio.sleep(0.001)

        async def asked(*, tcp):
            """As every client does, again: on a slow machine the flood leaves no room in the kernel's queue."""
            for _ in range(9):
                with contextlib.suppress(TimeoutError):
                    return await other.resolve("web.test", tcp=tcp, timeout_s=1)
            return None

        floods = [asyncio.create_task(flood(box)) for box in hostile]
        worst, most, rounds = 0.0, 0, 0
        while not all(f.done() for f in floods) or rounds < 10:
            began = time.monotonic()
            assert await asked(tcp=False) == [WEB]
            assert await asked(tcp=True) == [WEB]
            worst = max(worst, time.monotonic() - began)
            most = max(most, len(manager._resolver._tasks))
            rounds += 1
            await asyncio.sleep(0.05)
        await asyncio.gather(*floods)
        assert sent > 4000
        assert worst < 10
        assert 128 < most <= 256 + 64
        assert len(names(Path("/proc/self/fd"))) - files - len(held) < 400
        for sock in held:
            sock.close()

    with_network(body, questions_per_s=10_000, upstream_timeout_s=1)


def test_shares():
    shares = Shares(100, 10)
    held = [0] * 200
    for box in [*range(50)] * 20:
        held[box] += shares.take(held[box])
    assert max(held) <= 10
    assert min(held[:50]) >= 1
    taken = sum(held)
    assert taken < 100
    assert shares.take(0)
    for _ in range(taken + 1):
        shares.give_back()
    assert [shares.take(n) for n in (9, 10)] == [True, False]


def test_a_flood_of_questions_is_cut(with_network):
    async def body(lab, manager, make):
        box, other = await make(NetworkPolicy()), await make(NetworkPolicy.open())
        sock = box.socket(socket.SOCK_DGRAM)
        sock.connect((str(box.network.resolver), 53))
        for _ in range(5000):
            sock.send(b"\0\1\1\0\0\1\0\0\0\0\0\0\1x\4test\0\0\1\0\1")
        sock.close()
        began = time.monotonic()
        assert await other.resolve("web.test") == [WEB]
        assert time.monotonic() - began < 0.5
        assert 20 <= (await manager.statistics(box.network)).questions < 100

    with_network(body, questions_per_s=20)


def test_addresses_known_by_name_are_bounded(with_network):
    async def body(lab, manager, make):
        box = await make(NetworkPolicy(allow=("*.test",)))
        assert await box.resolve("web.test") == [WEB]
        assert await box.resolve("large.test", tcp=True) == "REFUSED"
        assert await box.resolve("other.test") == [OTHER]

    with_network(body, names_max=100)

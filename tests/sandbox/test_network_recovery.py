"""Networks outlive the daemon that made them, or go with it; nothing stays that nobody knows."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hadal.errors import NoCapacityError, NodeError
from hadal.node.network import LiveNetwork, NetworkManager, namespace, probe
from hadal.node.network.handles import BoxNetwork
from hadal.sandbox.network_policy import NetworkPolicy
from tests.sandbox.network_lab import OTHER, WEB, Box, needs_network
from tests.sandbox.network_lab import lab as lab
from tests.sandbox.network_lab import with_network as with_network

pytestmark = needs_network

POLICY = NetworkPolicy(allow=("web.test:443/tcp",))
HOLDER = """
import asyncio, json, sys
from pathlib import Path
from hadal.node.network import NetworkConfig, NetworkManager
from hadal.sandbox.network_policy import NetworkPolicy

async def main():
    directory, count, churn = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "churn"
    config = NetworkConfig(name="lab", directory=directory, upstreams=("192.0.2.1",), pool=4)
    manager = NetworkManager(config)
    await manager.recover(())
    policy = NetworkPolicy(allow=("web.test:443/tcp",))
    networks = [await manager.take(policy) for _ in range(count)]
    print(json.dumps([[n.number, str(n.path), str(n.address)] for n in networks]), flush=True)
    while churn:
        for n in networks:
            await manager.update(n, NetworkPolicy.open())
            await manager.give_back(n)
        networks = [await manager.take(policy) for _ in range(count)]
    await asyncio.sleep(60)

asyncio.run(main())
"""


def hold(lab, count=0, how="hold"):
    """Start a daemon of its own process; return it and its networks."""
    with namespace.entered(lab.node):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(lab.directory), str(count), how],
            stdout=subprocess.PIPE,
        )
    networks = [
        BoxNetwork(number, Path(path), address, "10.201.0.1")
        for number, path, address in json.loads(process.stdout.readline())
    ]
    return process, networks


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def in_node(lab, body):
    async def main():
        await lab.start()
        try:
            await body()
        finally:
            await lab.stop()

    with namespace.entered(lab.node):
        asyncio.run(main())


def sets_of(lab):
    """Return the elements of the router's sets about boxes, as text."""
    table = json.loads(lab.in_router("nft", "-j", "list", "table", "inet", "hadal"))["nftables"]
    return {
        found["name"]: found["elem"]
        for item in table
        for kind, found in item.items()
        if kind in ("set", "map") and found.get("elem")
        if found["name"] not in ("private", "never", "connections", "question_rate", "report_rate")
    }


def test_live_boxes_are_adopted_and_others_removed(lab):
    async def body():
        process, networks = await asyncio.to_thread(hold, lab, 3)
        box, unknown = Box(networks[0]), Box(networks[1])
        assert await box.resolve("web.test") == [WEB]
        assert await unknown.resolve("web.test") == [WEB]
        kept, lost = await box.connect(WEB, 443), await unknown.connect(WEB, 443)
        kill(process)
        assert await box.echoed(kept) == "ok"  # nobody is needed for that
        manager = NetworkManager(lab.config())
        live = [LiveNetwork(networks[0].number, POLICY), LiveNetwork(999, POLICY)]
        (adopted,) = await manager.recover(live)
        assert adopted.number == networks[0].number
        assert await box.echoed(kept) == "ok"
        assert await box.reach(WEB) == "ok"
        assert await box.reach(OTHER) == "ECONNREFUSED"
        assert await box.resolve("web.test") == [WEB]
        with pytest.raises((OSError, TimeoutError)):
            async with asyncio.timeout(0.3):
                await unknown.echoed(lost)
        elements = sets_of(lab)
        assert {len(e) for e in elements.values()} == {1}
        assert "name_ports" in elements
        links = lab.in_router("ip", "-o", "link").splitlines()
        assert sum("box" in line for line in links) <= 1 + 2  # and the pool
        taken = await manager.take(NetworkPolicy())
        assert taken.address != adopted.address
        await manager.update(adopted, NetworkPolicy(allow=(f"{OTHER}:443",)))
        with pytest.raises(ConnectionResetError):
            await box.echoed(kept)
        assert await box.reach(OTHER) == "ok"
        for sock in (kept, lost, box, unknown):
            sock.close()
        await manager.give_back(adopted)
        await manager.give_back(taken)
        assert sets_of(lab) == {}
        await manager.close()

    in_node(lab, body)
    assert [p.name for p in (lab.directory / "lab").iterdir()] == ["lock"]


def test_a_policy_that_the_filter_was_not_told_counts(lab):
    async def body():
        process, (network,) = await asyncio.to_thread(hold, lab, 1)
        box = Box(network)
        assert await box.resolve("web.test") == [WEB]
        sock = await box.connect(WEB, 443)
        kill(process)
        manager = NetworkManager(lab.config())
        (adopted,) = await manager.recover([LiveNetwork(network.number, NetworkPolicy())])
        with pytest.raises(ConnectionResetError):
            await box.echoed(sock)
        assert await box.reach(WEB) == "ECONNREFUSED"
        assert "name_ports" not in sets_of(lab)
        sock.close()
        box.close()
        await manager.give_back(adopted)
        await manager.close()

    in_node(lab, body)


@pytest.mark.parametrize("change", [True, False])
def test_names_of_before_end_with_the_policy_or_the_box(lab, change):
    async def body():
        process, (network,) = await asyncio.to_thread(hold, lab, 1)
        box = Box(network)
        assert await box.resolve("web.test") == [WEB]
        kill(process)
        manager = NetworkManager(lab.config())
        (adopted,) = await manager.recover([LiveNetwork(network.number, POLICY)])
        assert await box.reach(WEB) == "ok"
        if change:
            await manager.update(adopted, NetworkPolicy(allow=("other.test",)))
            assert await box.reach(WEB) == "ECONNREFUSED"
        box.close()
        await manager.give_back(adopted)
        assert sets_of(lab) == {}
        await manager.close()

    in_node(lab, body)


def test_networks_stay_when_a_manager_is_closed(lab):
    async def body():
        manager = NetworkManager(lab.config())
        await manager.recover(())
        box = Box(await manager.take(NetworkPolicy(allow=(WEB,))))
        sock = await box.connect(WEB, 443)
        await manager.close()
        assert await box.echoed(sock) == "ok"
        manager = NetworkManager(lab.config())
        live = LiveNetwork(box.network.number, NetworkPolicy(allow=(WEB,)))
        (adopted,) = await manager.recover([live])
        assert await box.echoed(sock) == "ok"
        sock.close()
        box.close()
        await manager.give_back(adopted)
        await manager.close()

    in_node(lab, body)
    assert [p.name for p in (lab.directory / "lab").iterdir()] == ["lock"]


def test_rules_of_another_version_are_made_anew(lab):
    async def body():
        process, _ = await asyncio.to_thread(hold, lab, 1)
        kill(process)
        manager = NetworkManager(lab.config(connections_max=7))
        assert await manager.recover([]) == []
        assert "ct count over 7" in lab.in_router("nft", "list", "table", "inet", "hadal")
        await manager.close()

    in_node(lab, body)


def test_one_daemon_at_a_time(with_network):
    async def body(lab, manager, make):
        with pytest.raises(NodeError, match="another node daemon"):
            await NetworkManager(lab.config()).recover(())
        box = await make(NetworkPolicy.open())
        assert await box.reach(WEB) == "ok"
        beside = NetworkManager(lab.config(name="beside"))
        await beside.recover(())
        other = Box(await beside.take(NetworkPolicy.open()))
        assert await other.reach(WEB) == "ok"
        assert await box.reach(WEB) == "ok"
        other.close()
        await beside.give_back(other.network)
        await beside.close()

    with_network(body)


LIFE = """
import asyncio, sys
from pathlib import Path
from hadal.node.network import NetworkConfig, NetworkManager
from hadal.sandbox.network_policy import NetworkPolicy

async def main():
    config = NetworkConfig(name="lab", directory=Path(sys.argv[1]), upstreams=("192.0.2.1",), pool=1)
    async with NetworkManager(config) as manager:
        networks = [await manager.take(NetworkPolicy(allow=(f"192.0.2.{n}",))) for n in range(2)]
        await manager.update(networks[0], NetworkPolicy.open())
        for network in networks:
            await manager.give_back(network)

asyncio.run(main())
"""


def nothing_is_left(lab):
    async def body():
        manager = NetworkManager(lab.config(pool=0))
        await manager.recover(())
        assert sets_of(lab) == {}
        assert "box" not in lab.in_router("ip", "-o", "link")
        await manager.close()

    in_node(lab, body)
    assert [p.name for p in (lab.directory / "lab").iterdir()] == ["lock"]
    with namespace.entered(lab.node):
        assert "lab" not in subprocess.run(["ip", "-o", "link"], stdout=-1, text=True).stdout
        assert not subprocess.run(["nft", "list", "tables"], stdout=-1).stdout


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_each_point_nothing_is_orphaned(lab, step):
    """The daemon is ended at its first, second, ... point of `hadal.node.faults`."""
    for point in range(1, 200, step):
        environment = os.environ | {"HADAL_FAULT": f"kill:{point}"}
        with namespace.entered(lab.node):
            command = [sys.executable, "-c", LIFE, str(lab.directory)]
            status = subprocess.run(command, env=environment).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"point {point}"
        nothing_is_left(lab)
    assert point > 40


@pytest.mark.slow
def test_killed_anywhere_nothing_is_orphaned(lab):
    delays = random.Random(0)
    for _ in range(40):
        process, _ = hold(lab, 5, "churn")
        time.sleep(delays.uniform(0, 0.1))
        kill(process)
    nothing_is_left(lab)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_boxes(with_network, count):
    async def body(lab, manager, make):
        began = time.monotonic()
        boxes = [await make(NetworkPolicy(allow=(f"{WEB}:443",))) for _ in range(count)]
        assert time.monotonic() - began < count * 0.05
        for box in boxes:
            assert await box.reach(WEB) == "ok"
        assert await boxes[0].reach(str(boxes[-1].network.address)) == "ECONNREFUSED"

    with_network(body, pool=16)


def test_a_range_ends(with_network):
    async def body(lab, manager, make):
        networks = [await manager.take(NetworkPolicy()) for _ in range(5)]
        with pytest.raises(NoCapacityError, match="all 5 networks") as found:
            await manager.take(NetworkPolicy())
        assert found.value.retryable
        for network in networks[:2]:
            await manager.give_back(network)
        await asyncio.sleep(0.2)
        networks[:2] = [await manager.take(NetworkPolicy())]
        for network in networks:
            await manager.give_back(network)

    with_network(body, boxes="10.201.0.0/29", pool=1)


UNPRIVILEGED = """
import asyncio, os, sys
from pathlib import Path
from hadal.errors import UnsupportedError
from hadal.node.network import NetworkConfig, NetworkManager
from hadal.node.network.findings import probe
if sys.argv[2] == "nobody":
    os.setuid(65534)
try:
    asyncio.run(NetworkManager(NetworkConfig(name="x", directory=Path(sys.argv[1]))).recover(()))
except UnsupportedError as error:
    print(error)
print([(f.what, f.works) for f in probe()])
"""


def test_without_privileges(lab, tmp_path):
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]:
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o5)
    with namespace.entered(lab.node):
        result = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "n"), "nobody"],
            capture_output=True,
            text=True,
        )
    assert "cannot be made" in result.stdout, result.stderr
    assert "hint: run the node daemon as root" in result.stdout
    assert "('network namespaces', False)" in result.stdout


def test_without_nftables(lab, tmp_path):
    """The library is hidden, in a mount namespace."""
    script = (
        "for f in /usr/lib/*/libnftables.so.1 /usr/lib64/libnftables.so.1; do "
        '[ -e "$f" ] && mount --bind /dev/null "$f"; done; exec "$@"'
    )
    with namespace.entered(lab.node):
        result = subprocess.run(
            [
                *("unshare", "-m", "sh", "-c", script, "sh"),
                *(sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "n"), "root"),
            ],
            capture_output=True,
            text=True,
        )
        left = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    assert "hint: apt-get install nftables" in result.stdout, result.stderr
    assert "('nftables', False)" in result.stdout
    assert "x0" not in left.stdout


def test_probe(lab):
    with namespace.entered(lab.node):
        findings = probe()
    assert [f for f in findings if not f.works] == []
    assert len(findings) == 5

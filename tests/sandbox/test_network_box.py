"""A real box on a network of its own: what its root sees, can do and cannot."""

import asyncio
import os
import signal
from pathlib import Path

from hadal.node.guest import Guest
from hadal.node.guest_program import guest_program
from hadal.node.launcher import Launcher, LaunchRequest
from hadal.sandbox.network_policy import NetworkPolicy
from tests.sandbox.conftest import RawBox
from tests.sandbox.network_lab import METADATA, OTHER, WEB, needs_network
from tests.sandbox.network_lab import lab as lab
from tests.sandbox.network_lab import with_network as with_network

pytestmark = needs_network

CONNECT = """
import socket, sys
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
    s.sendall(b"hi"); print(s.recv(10).decode())
except OSError as error:
    print(type(error).__name__)
"""
RAW = "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 255)"


def test_root_in_a_box_stays_within_its_policy(with_network, rootfs, tmp_path):
    async def body(lab, manager, make):
        network = await manager.take(NetworkPolicy(allow=("web.test:443",)))
        exits = asyncio.Queue()
        launcher = Launcher(guest_program(), lambda pid, status: exits.put_nowait(pid))
        launcher.start()
        folder = tmp_path / "box"
        for name in ("mounts", "scratch"):
            (folder / name).mkdir(parents=True)
        launched = await launcher.launch(
            LaunchRequest(
                hostname="box",
                layers=(rootfs,),
                run_directory=folder / "mounts",
                socket=folder / "guest",
                scratch=folder / "scratch",
                uid_base=1 << 20,
                binds=((Path("/usr"), "/usr", True),),
                network=network.path,
                etc={"resolv.conf": network.resolv_conf},
            )
        )
        guest = await Guest.connect(folder / "guest")
        box = RawBox(guest, launched.pid, folder)
        try:
            await use(box, manager, network)
        finally:
            guest.close()
            os.kill(launched.pid, signal.SIGKILL)
            await asyncio.wait_for(exits.get(), 10)
            launcher.close()
            await manager.give_back(network)

    with_network(body)


async def use(box, manager, network):
    async def connect(host, port=443):
        ended, out, err = await box.run("/usr/bin/python3", "-c", CONNECT, host, str(port))
        assert ended.status == 0, err
        return out.decode().strip()

    assert await connect("web.test") == "hi"
    assert await connect("web.test", 80) == "ConnectionRefusedError"
    assert await connect("other.test") == "gaierror"
    assert await connect(OTHER) == "ConnectionRefusedError"
    assert await connect(METADATA, 80) == "ConnectionRefusedError"
    assert await connect("::1", 80) == "ConnectionRefusedError"
    for command in (
        "ip link set eth0 down",
        "ip addr add 203.0.113.99/32 dev eth0",
        "ip route del default",
        "ip neigh del 10.201.0.1 dev eth0",
        "nft list ruleset",
        f"/usr/bin/python3 -c '{RAW}'",
        "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6",
    ):
        ended, _, err = await box.shell(f"PATH=/usr/sbin:/usr/bin {command}")
        assert ended.status != 0, command
        assert b"not found" not in err, err
    await manager.update(network, NetworkPolicy(allow=(f"{OTHER}:443",)))
    assert await connect(OTHER) == "hi"
    assert await connect(WEB) == "ConnectionRefusedError"
    targets = {d.target for d in (await manager.statistics(network)).denials}
    assert {f"{WEB}:80/tcp", "other.test", f"{METADATA}:80/tcp"} <= targets

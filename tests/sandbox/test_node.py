"""What a node adds to its boxes: images with their settings, networks, and finding both again."""

import asyncio
import hashlib
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from hadal.errors import (
    ConfigError,
    GoneCause,
    HadalError,
    ImageError,
    NoCapacityError,
    SandboxGoneError,
    UnsupportedError,
)
from hadal.node.images import default_folder
from hadal.node.node import Node
from hadal.node.node_config import NodeConfig
from hadal.node.slots import Slots
from hadal.sandbox import ContainerSpec, NetworkPolicy, Sandbox
from hadal.sandbox.embedded import state_folder
from hadal.sandbox.protocol import CreateRequest
from hadal.sandbox.specs import Capability, FunctionSpec, VMSpec, read_spec
from tests.sandbox.conftest import needs_root
from tests.sandbox.network_lab import needs_network
from tests.sandbox.test_crashes import Daemon, left_behind

pytestmark = needs_root


@pytest.fixture
def daemon(tmp_path):
    found = Daemon(tmp_path / "n")
    yield found
    found.stop()


@pytest.fixture
def daemon_in_a_network(tmp_path):
    """A node whose host side is a network namespace of the test."""
    name = f"hadal-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    found = Daemon(tmp_path / "n", prefix=("nsenter", f"--net=/run/netns/{name}"))
    yield found
    found.stop()
    subprocess.run(["ip", "netns", "delete", name], check=True)
    node_name = f"embedded-{found.state.stat().st_ino}".encode()
    router = f"h{hashlib.sha256(node_name).hexdigest()[:8]}/router"  # others may have theirs
    assert router not in Path("/proc/self/mounts").read_text(), "a network is left"


def test_a_client_that_leaves_at_once(daemon):
    """As one does that is killed: nothing has failed, and others are served."""
    daemon.start()
    with Sandbox.create(node=daemon.url) as box:
        box.spawn("sleep 100")
        request = (
            f"GET /v1/boxes/{box.id}/commands/1/attach HTTP/1.1\r\nHost: node\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(daemon.state / "node.sock"))
                client.sendall(request.encode())
        assert box.run("echo there").stdout == "there\n"
    assert "client has left" in daemon.log()
    assert "Traceback" not in daemon.log()


def test_an_image_is_a_directory(daemon, rootfs):
    daemon.start()
    (rootfs / "etc/marker").write_text("of the image")
    (rootfs / "usr/bin").mkdir(parents=True)
    with Sandbox.create(str(rootfs), node=daemon.url) as box:
        assert box.files.read_text("/etc/marker") == "of the image"
        box.files.write("/etc/marker", "changed")
        with Sandbox.create(str(rootfs), node=daemon.url) as other:
            assert other.files.read_text("/etc/marker") == "of the image"
    assert (rootfs / "etc/marker").read_text() == "of the image"
    for name in ("no/such/image:1", "/no/such/directory"):
        with pytest.raises(HadalError):
            Sandbox.create(name, node=daemon.url)
    assert left_behind(daemon.state) == []


def test_a_snapshot_outlives_node_and_box(daemon):
    daemon.start()
    with Sandbox.create(node=daemon.url) as box:
        box.run("echo kept > /kept")
        assert box.snapshot("mine") == "mine"
    daemon.kill()
    with Sandbox.create(ContainerSpec(from_="mine"), node=daemon.url) as box:
        assert box.run("cat /kept").stdout == "kept\n"
    with pytest.raises(ImageError):
        Sandbox.create(ContainerSpec(from_="sha256:" + "0" * 64), node=daemon.url)


def test_names_are_shared_and_free_again(daemon):
    daemon.start()
    first = Sandbox.create(node=daemon.url, name="shared")
    first.detach()
    with Sandbox.create(node=daemon.url, name="shared") as again:
        assert again.id == first.id
    with Sandbox.create(node=daemon.url, name="shared") as other:
        assert other.id != first.id
    with pytest.raises(SandboxGoneError):
        Sandbox.connect(first.id, node=daemon.url)


@needs_network
def test_a_network_follows_its_policy_and_survives_the_node(daemon_in_a_network):
    daemon = daemon_in_a_network
    daemon.start()
    policy = NetworkPolicy(default="deny", allow=("192.0.2.0/24:80",))
    with Sandbox.create(ContainerSpec(network=policy), node=daemon.url) as box:
        connect = "import socket; socket.create_connection(('{}', 80), timeout=5)"
        began = time.monotonic()
        denied = box.run(["python3", "-c", connect.format("198.51.100.1")])
        assert "refused" in denied.stderr.lower() or "unreachable" in denied.stderr.lower(), denied
        assert time.monotonic() - began < 3
        assert "198.51.100.1" in str(box.network()["denials"])
        assert box.run("cat /etc/resolv.conf").stdout.startswith("nameserver ")
        daemon.kill()
        box.set_network(NetworkPolicy(default="deny", allow=("198.51.100.0/24",)))
        assert box.log()[-1].kind == "network"
        later = box.run(["python3", "-c", connect.format("198.51.100.1")])
        assert later.stderr  # nobody is there; but it is not the policy any more
        assert len(box.network()["denials"]) <= 1
    alone = Sandbox.create(node=daemon.url)
    with alone, pytest.raises(UnsupportedError, match="without a network"):
        alone.set_network(policy)
    assert left_behind(daemon.state) == []


def test_a_spec_says_what_is_wrong_with_it():
    for wrong, text in (
        ({"backend": "container", "memory": 5}, "memory"),
        ({"backend": "container", "memory_mb": -1}, "memory_mb"),
        ({"backend": "spaceship"}, "spaceship"),
        ({"backend": "container", "network": {"default": "deny", "allow": ["!"]}}, "network"),
    ):
        with pytest.raises(ConfigError, match=text):
            read_spec(wrong)


def test_every_capability_is_one_of_some_backend():
    backends = (ContainerSpec, FunctionSpec, VMSpec)
    assert set().union(*(spec.capabilities for spec in backends)) == set(Capability)


def test_a_full_node_says_so(tmp_path):
    async def main():
        node = Node(NodeConfig(state=tmp_path / "small", name="small-node", max_boxes=1))
        await node.start()
        spec = {"backend": "container"}
        box = await node.create(CreateRequest(spec=spec, request_id="a"))
        with pytest.raises(NoCapacityError):
            await node.create(CreateRequest(spec=spec, request_id="b"))
        assert (await node.create(CreateRequest(spec=spec, request_id="a"))).id == box.id
        await node.close(end_boxes=True)
        assert not list((tmp_path / "small/b").iterdir())

    asyncio.run(main())


def test_what_boxes_may_use_together_is_limited(tmp_path):
    """By their limits; what has ended counts no more."""

    async def main():
        node = Node(NodeConfig(state=tmp_path / "small", name="small-node", memory_mb=1000))
        await node.start()

        def create(request_id, memory_mb):
            spec = {"backend": "container", "memory_mb": memory_mb}
            return node.create(CreateRequest(spec=spec, request_id=request_id))

        first = await create("a", 600)
        with pytest.raises(NoCapacityError, match="600 of 1000 MiB, and this one would 401 more"):
            await create("b", 401)
        await create("c", 400)
        assert node.memory_mb == 1000
        await node.end(first.id, GoneCause.KILLED)
        await create("e", 600)
        assert node.memory_mb == 1000
        await node.close(end_boxes=True)

    asyncio.run(main())


def test_boxes_of_an_earlier_daemon_count():
    slots = Slots(3, memory_mb=100)
    slots.adopt("old", 7, 80)  # of a node that had more places
    with pytest.raises(NoCapacityError, match="80 of 100 MiB"):
        slots.take("new", 30)
    assert slots.take("new", 20) == 0
    slots.give_back("old")
    slots.give_back("old")
    assert (slots.used_mb, len(slots)) == (20, 1)


def test_a_box_that_sleeps_does_not_count():
    slots = Slots(3, memory_mb=100)
    slots.take("a", 80)
    slots.rest("a")
    assert slots.take("b", 60) == 1
    with pytest.raises(NoCapacityError, match="60 of 100 MiB"):
        slots.rise("a", 80)
    slots.give_back("b")
    slots.rise("a", 80)
    slots.rise("a", 80)
    assert (slots.used_mb, len(slots)) == (80, 1)
    slots.rest("a")
    slots.give_back("a")
    assert (slots.used_mb, len(slots)) == (0, 0)


def test_the_command_line_sees_the_images_of_the_embedded_node(monkeypatch, tmp_path):
    monkeypatch.setenv("HADAL_HOME", str(tmp_path))
    assert default_folder() == Node(NodeConfig(state=state_folder())).images.root

"""Boxes that stand still: paused, held while their files are copied, both at once, and after a restart."""

import asyncio
import socket
import time

import pytest

from hadal.cli.main import app
from hadal.node.cgroups import Cgroups
from hadal.node.journal import Journal
from hadal.node.node import Node
from hadal.node.node_config import NodeConfig
from hadal.sandbox import ContainerSpec, FunctionSpec, Sandbox
from hadal.sandbox.protocol import CreateRequest
from tests.sandbox.conftest import needs_root
from tests.sandbox.test_crashes import daemon as daemon
from tests.sandbox.test_crashes import left_behind

pytestmark = needs_root
TICK = "while sleep 0.05; do echo . >> /tmp/ticks; done"


def groups(daemon, box):
    return Cgroups(f"embedded-{daemon.state.stat().st_ino}").of(box.id)


def test_a_pause_is_remembered_by_the_next_daemon(daemon):
    daemon.start()
    with Sandbox.create(node=daemon.url) as box:
        box.spawn(TICK)
        time.sleep(0.2)
        box.pause()
        daemon.kill()
        assert box.info().state == "paused"
        time.sleep(1)
        assert groups(daemon, box).is_frozen()
        assert int(box.run("wc -l < /tmp/ticks").stdout) < 15
        assert box.info().state == "running"
        daemon.kill()
        assert box.info().state == "running"
        time.sleep(0.5)
        assert int(box.run("wc -l < /tmp/ticks").stdout) >= 10
        assert {e.state for e in box.log()} == {"begun", "done"}
    assert left_behind(daemon.state) == []


def test_a_box_that_a_daemon_held_when_it_died_goes_on(daemon):
    """Frozen, it could not even say that it is there."""
    daemon.start()
    with Sandbox.create(node=daemon.url) as box:
        groups(daemon, box).freeze()
        daemon.kill()
        assert box.info().state == "running"
        assert box.run("echo on").stdout == "on\n"


def test_a_paused_box_ends_like_any_other(daemon):
    daemon.start()
    box = Sandbox.create(node=daemon.url)
    box.spawn("sleep 60")
    box.pause()
    began = time.monotonic()
    box.kill()
    assert left_behind(daemon.state) == []
    assert time.monotonic() - began < 2


@pytest.fixture
def with_node(tmp_path):
    """Run a coroutine function with a node in this process and a box of it."""

    def run(body):
        async def main():
            node = Node(NodeConfig(state=tmp_path / "n", name="test-pause"))
            await node.start()
            try:
                spec = {"backend": "container", "memory_mb": 64}
                await body(node, await node.create(CreateRequest(spec=spec, request_id="a")))
            finally:
                await node.close(end_boxes=True)

        asyncio.run(main())

    return run


def test_a_box_stands_still_as_long_as_anybody_wants_it(with_node):
    async def body(node, box):
        still = box.cgroup.is_frozen
        async with box.held_still():
            async with box.held_still():
                assert still()
            assert still()
            await box.pause()
            box.touch()
            assert still()
            await box.pause()
        assert still()
        async with box.held_still():
            box.touch()
            assert still()
            assert not box.paused
        assert not still()

    with_node(body)


def test_a_pause_and_its_end_at_once(with_node):
    async def body(node, box):
        pausing = asyncio.create_task(box.pause())
        await asyncio.sleep(0)
        box.touch()
        await asyncio.wait_for(pausing, 1)
        assert not box.paused
        assert not box.cgroup.is_frozen()
        assert Journal(node.config.state / "journal.db").box(box.id).state == "running"

    with_node(body)


def test_a_pause_gives_back_what_the_kernel_can_take(daemon):
    """What files have, too; with the memory of processes it needs swap."""
    daemon.start()
    with Sandbox.create(ContainerSpec(memory_mb=256), node=daemon.url) as box:
        box.run("head -c 60000000 /dev/urandom > /home/f; cat /home/f > /dev/null; sync")
        running = box.spawn("sleep 1; echo on")
        before = groups(daemon, box).memory_bytes()
        assert before > 50 << 20
        box.pause(reclaim=True)
        assert groups(daemon, box).memory_bytes() < before // 2
        assert box.info().state == "paused"
        assert groups(daemon, box).is_frozen()
        assert running.wait().stdout == "on\n"
        assert box.run("wc -c < /home/f").stdout == "60000000\n"


def test_a_box_that_nobody_uses_is_paused(daemon):
    """Not while a command runs in it, or a call of a function."""
    daemon.start()
    with Sandbox.create(ContainerSpec(pause_s=0.5), node=daemon.url) as box:
        assert box.run("sleep 1.5; echo ran").stdout == "ran\n"
        assert box.info().state == "running"
        time.sleep(1.5)
        assert box.info().state == "paused"
        assert groups(daemon, box).is_frozen()
        assert box.run("echo on").stdout == "on\n"
        assert box.info().state == "running"
    with Sandbox.create(FunctionSpec(pause_s=0.5), node=daemon.url) as box:
        slow = "import time\ndef f():\n    time.sleep(1.5)\n    return 7\n"
        assert box.call(slow).value == 7
        time.sleep(1.5)
        assert box.info().state == "paused"
        assert box.call(slow).value == 7


_ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 8000))
connection, _ = server.accept()
connection.sendall(connection.recv(9))
"""


def test_a_connection_to_a_port_is_use(daemon):
    daemon.start()
    with Sandbox.create(ContainerSpec(pause_s=0.5), node=daemon.url) as box:
        box.files.write("/tmp/echo.py", _ECHO)
        box.run("nohup python3 /tmp/echo.py > /dev/null 2>&1 & sleep 0.5")
        with socket.create_connection(("127.0.0.1", box.forward(8000))) as connection:
            time.sleep(1.5)
            assert box.info().state == "running"
            box.pause(reclaim=True)
            connection.sendall(b"x")  # what comes through it is a request
            assert connection.recv(9) == b"x"
        time.sleep(1.5)
        assert box.info().state == "paused"


def test_the_command_line_pauses_and_resumes(daemon):
    daemon.start()

    def box_command(*arguments):
        app(["box", *arguments, "--node", daemon.url], result_action="return_value")

    with Sandbox.create(node=daemon.url) as box:
        for reclaim in ((), ("--reclaim",)):
            box_command("pause", box.id, *reclaim)
            assert box.info().state == "paused"
            box_command("resume", box.id)
            assert box.info().state == "running"

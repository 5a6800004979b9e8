"""Machines that are paused with their memory given back: nothing is left of them in it, and any request wakes them."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hadal.errors import GoneCause, HadalError, NoCapacityError, SandboxGoneError
from hadal.node.node import Node
from hadal.node.node_config import NodeConfig
from hadal.sandbox import MicroVMSpec, NetworkPolicy, Sandbox, VMSpec
from hadal.sandbox.protocol import CommandRequest, CreateRequest
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines, qemu_of
from tests.sandbox.network_lab import needs_network
from tests.sandbox.test_crashes import Daemon, left_behind

pytestmark = needs_root
COUNT = "n=0; while [ $n -lt 300 ]; do n=$((n+1)); echo $n; sleep 0.01; done"
COUNTED = "".join(f"{n}\n" for n in range(1, 301))


@pytest.fixture(scope="module")
def state(tmp_path_factory, kernel):
    """The folder of a node with an image for machines; its templates are made once."""
    needs_machines()
    found = tmp_path_factory.mktemp("n")
    import_image(found / "images", tmp_path_factory.mktemp("image"))
    return found


@pytest.fixture
def daemon(state):
    found = Daemon(state)
    yield found
    found.stop()
    assert left_behind(state) == []
    assert "Traceback" not in found.log()


def make(daemon, spec=MicroVMSpec, **changes):
    return Sandbox.create(spec(image="machine-lab:1", **changes), node=daemon.url)


def processes(box):
    """Those of a box on the host."""
    groups = Path("/sys/fs/cgroup").glob(f"**/hadal/*/{box.id}/cgroup.procs")
    return {pid for group in groups for pid in group.read_text().split()}


def sleeps(box):
    return box.info().state == "paused" and not processes(box)


def until(condition, patience_s=30):
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


_SERVER = """
import itertools, socket
server = socket.create_server(("127.0.0.1", 8000))
for n in itertools.count(1):
    connection, _ = server.accept()
    connection.sendall(b"%d\\n" % n)
    connection.close()
"""


@pytest.mark.slow
def test_nothing_of_a_machine_is_left_in_memory_and_it_goes_on_where_it_was(daemon, state):
    """Files, commands, a server that listens, its names, and the time."""
    daemon.start()
    with make(daemon) as box:
        names = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname"
        named = box.run(names).stdout
        box.files.write("/home/server.py", _SERVER)
        ask = "exec 3<> /dev/tcp/127.0.0.1/8000 && cat <&3"
        box.run(f"nohup python3 /home/server.py & while ! bash -c '{ask}'; do sleep 0.1; done")
        up = float(box.run("cut -d ' ' -f 1 /proc/uptime").stdout)
        counting = box.spawn(COUNT)
        for round_ in (2, 3):
            assert processes(box)
            box.pause(reclaim=True)
            assert sleeps(box)
            assert box.usage().memory_bytes < 16 << 20
            assert sleeps(box)
            time.sleep(0.5)
            assert box.run(["bash", "-c", ask]).stdout == f"{round_}\n"
            assert not sleeps(box)
        assert counting.wait().stdout == COUNTED
        assert box.run(names).stdout == named
        assert abs(float(box.run("date +%s.%N").stdout) - time.time()) < 1
        assert float(box.run("cut -d ' ' -f 1 /proc/uptime").stdout) > up
        until(lambda: not (state / "b" / box.id / "asleep").exists())
        (fork,) = box.fork()
        with fork:
            assert fork.run(["bash", "-c", ask]).stdout == "4\n"


def test_requests_at_once_wake_it_once(daemon):
    daemon.start()
    with make(daemon) as box, ThreadPoolExecutor(6) as pool:
        box.pause(reclaim=True)
        before = daemon.log().count("box has woken")
        answers = pool.map(lambda n: box.run(f"echo {n}").stdout, range(6))
        assert list(answers) == [f"{n}\n" for n in range(6)]
        assert qemu_of(box)
        assert daemon.log().count("box has woken") == before + 1


@pytest.mark.slow
def test_requests_while_it_falls_asleep(daemon):
    """Whenever one comes, it is done, once."""
    daemon.start()
    with make(daemon) as box:
        counting = box.spawn(COUNT)
        for n in range(12):
            pausing = threading.Thread(target=box.pause, kwargs={"reclaim": True})
            pausing.start()
            time.sleep(0.08 * n)
            box.run(f"echo {n} >> /home/done", check=True)
            pausing.join()
        assert box.run("cat /home/done").stdout == "".join(f"{n}\n" for n in range(12))
        assert counting.wait().stdout == COUNTED


def test_input_for_a_command_wakes_it(daemon):
    daemon.start()
    with make(daemon) as box:
        cat = box.spawn("cat", interactive=True)
        cat.write("before\n")
        box.pause(reclaim=True)
        assert sleeps(box)
        cat.write("after\n")
        cat.close_stdin()
        assert cat.wait().stdout == "before\nafter\n"


def test_what_needs_its_hypervisor_wakes_it(daemon):
    """A picture of its screen, copies of it, and a snapshot."""
    daemon.start()
    with make(daemon, VMSpec, memory_mb=128) as box:
        box.run("echo kept > /dev/shm/f")
        box.pause(reclaim=True)
        assert box.screenshot().startswith(b"\x89PNG")
        box.pause(reclaim=True)
        (fork,) = box.fork()
        with fork:
            fork.pause(reclaim=True)
            assert fork.run("cat /dev/shm/f").stdout == "kept\n"
        box.pause(reclaim=True)
        reference = box.snapshot(kind="full")
        box.pause(reclaim=True)
        with Sandbox.create(VMSpec(from_=reference, memory_mb=128), node=daemon.url) as again:
            assert again.run("cat /dev/shm/f").stdout == "kept\n"
        assert sleeps(box)


def test_a_machine_that_nobody_uses_is_paused(daemon):
    """Not while a command runs in it."""
    daemon.start()
    with make(daemon, pause_s=1) as box:
        assert box.run("sleep 3; echo ran").stdout == "ran\n"
        assert not sleeps(box)
        until(lambda: sleeps(box))
        assert box.run("echo there").stdout == "there\n"
        assert not sleeps(box)


@pytest.mark.slow
def test_a_machine_sleeps_on_when_its_daemon_dies(daemon):
    """What ran in it goes on when somebody waits for it, and its output is all there."""
    daemon.start()
    with make(daemon) as box:
        counting = box.spawn(COUNT)
        box.run("echo kept > /home/f")
        box.pause(reclaim=True)
        daemon.kill()
        assert box.info().state == "paused"
        assert sleeps(box)
        assert counting.wait().stdout == COUNTED
        assert box.run("cat /home/f").stdout == "kept\n"
        box.pause(reclaim=True)
        assert sleeps(box)
        daemon.kill()
        assert sleeps(box)
    assert left_behind(daemon.state) == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_daemon_that_dies_while_a_machine_falls_asleep_or_wakes(daemon):
    """At every point: afterwards it sleeps or it runs, it has lost nothing, and nothing is left of what it was not."""
    daemon.start()
    with make(daemon) as box:
        counting = box.spawn("n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done")
        daemon.stop()
        for number in range(1, 40):
            daemon.deaths = 0
            daemon.start(f"kill:{number}")
            box.pause(reclaim=True)
            assert sleeps(box)
            assert box.run(f"echo {number} >> /home/f; wc -l < /home/f").stdout == f"{number}\n"
            assert box.info().state == "running"
            deaths = daemon.deaths
            daemon.stop()
            if deaths == 0:
                break
        assert 5 < number < 39
        daemon.start()
        counting.kill()
        lines = counting.wait().stdout.split()
        assert lines == [str(n) for n in range(1, len(lines) + 1)]


@pytest.mark.timeout(600)
def test_a_full_disk_while_a_machine_falls_asleep(daemon):
    """It is said, and it runs on."""
    daemon.start()
    with make(daemon) as box:
        errors = []
        for number in range(1, 5):
            daemon.stop()
            daemon.start(f"full:{number}")
            try:
                box.pause(reclaim=True)
            except HadalError as error:
                errors.append(str(error))
                assert box.info().state == "running"
                assert box.run("echo on").stdout == "on\n"
                box.pause(reclaim=True)
            assert sleeps(box)
            assert box.run("echo there").stdout == "there\n"
        assert len(errors) > 1
        assert all("No space" in error or "fault at" in error for error in errors), errors


@pytest.mark.parametrize("name", ["memory", "devices"])
def test_a_machine_that_does_not_wake_is_gone(daemon, state, name):
    daemon.start()
    box = make(daemon)
    box.pause(reclaim=True)
    path = state / "b" / box.id / "asleep" / name
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SandboxGoneError) as caught:
        box.run("true")
    assert caught.value.cause == GoneCause.NOT_WOKEN
    assert box.info().cause == "not_woken"
    assert "box does not wake: what was kept of its memory is damaged" in daemon.log()


def test_a_machine_that_sleeps_ends_like_any_other(daemon):
    daemon.start()
    box = make(daemon)
    running = box.spawn("sleep 60")
    box.pause(reclaim=True)
    began = time.monotonic()
    assert box.kill()
    assert left_behind(daemon.state) == []
    assert time.monotonic() - began < 3
    with pytest.raises(SandboxGoneError):
        running.wait()
    box = make(daemon, idle_s=2)
    box.pause(reclaim=True)
    until(lambda: box.info().state == "gone")
    assert box.info().cause == "idle"


@needs_network
def test_a_machine_has_its_network_again(daemon):
    """The same address, and what it may reach is what was said last."""
    daemon.start()
    with make(daemon, network=NetworkPolicy(default="deny")) as box:
        show = "ip -4 -o addr show eth0; cat /sys/class/net/eth0/address"
        own = box.run(show).stdout
        tried = "timeout 5 bash -c '> /dev/tcp/{}/80'"
        box.run(tried.format("192.0.2.1"))
        for number in (2, 3):
            box.pause(reclaim=True)
            assert sleeps(box)
            daemon.kill()
            box.run(tried.format(f"192.0.2.{number}"))
            assert f"192.0.2.{number}:80/tcp" in {d["target"] for d in box.network()["denials"]}
            assert box.run(show).stdout == own


def test_others_have_its_memory_meanwhile(state, tmp_path, kernel):
    """Where there is none left for it, it is not woken, and whoever asks is told so."""
    spec = {"backend": "microvm", "image": "machine-lab:1", "memory_mb": 128}

    async def main():
        node = Node(NodeConfig(state=state, name="test-sleep", memory_mb=500))
        await node.start()
        try:
            box = await node.create(CreateRequest(spec=spec, request_id="a"))
            with pytest.raises(NoCapacityError):
                await node.create(CreateRequest(spec=spec, request_id="b"))
            await node.sleep.begin(box)
            assert node.memory_mb == 0
            other = await node.create(CreateRequest(spec=spec, request_id="c"))
            for _ in range(2):
                with pytest.raises(NoCapacityError, match="384 of 500 MiB"):
                    await box.start(CommandRequest(argv=("true",), request_id="d"))
            assert node.info(box.id).state == "paused"
            await node.end(other.id, GoneCause.KILLED)
            command = await box.start(CommandRequest(argv=("true",), request_id="d"))
            assert (await command.result).exit_code == 0
            assert node.memory_mb == 384
        finally:
            await node.close(end_boxes=True)

    asyncio.run(main())


def test_a_request_while_the_kernel_takes_its_memory_wakes_it_once(state, kernel):
    """That can take long: its hypervisor is gone already, and it does not sleep yet."""
    spec = {"backend": "microvm", "image": "machine-lab:1", "memory_mb": 128}

    async def main():
        node = Node(NodeConfig(state=state, name="test-sleep"))
        await node.start()
        try:
            box = await node.create(CreateRequest(spec=spec, request_id="slow"))
            take, may_end, woken = box.cgroup.reclaim, threading.Event(), []
            wake = node.machines.wake
            box.cgroup.reclaim = lambda: (may_end.wait(), take())

            async def counted(*arguments):
                woken.append(box.id)
                return await wake(*arguments)

            node.machines.wake = counted
            falls = asyncio.create_task(node.sleep.begin(box))
            while box.cgroup.processes():  # noqa: ASYNC110 - nobody says when they are gone
                await asyncio.sleep(0.01)
            command = await box.start(CommandRequest(argv=("true",), request_id="e"))
            may_end.set()
            await falls
            assert (await command.result).exit_code == 0
            assert woken == [box.id]
        finally:
            await node.close(end_boxes=True)

    asyncio.run(main())

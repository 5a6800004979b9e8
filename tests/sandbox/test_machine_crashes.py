"""Virtual machines when something dies, is damaged, is full or does not answer: named errors, and nothing left."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hadal.errors import GoneCause, HadalError, ImageError, NodeError, SandboxGoneError
from hadal.sandbox import MicroVMSpec, NetworkPolicy, Sandbox
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines, qemu_of
from tests.sandbox.network_lab import needs_network
from tests.sandbox.test_crashes import Daemon, left_behind

pytestmark = needs_root


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


def make(daemon, **changes):
    return Sandbox.create(MicroVMSpec(image="machine-lab:1", **changes), node=daemon.url)


@needs_network
def test_a_machine_outlives_its_daemon(daemon):
    """Its commands go on, its network too, and it can still be copied."""
    daemon.start()
    with make(daemon, network=NetworkPolicy(default="deny")) as box:
        identity = box.run("cat /etc/machine-id").stdout
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(box.run, "sleep 2; echo done; cat /etc/machine-id")
            time.sleep(0.5)
            daemon.kill()
            assert running.result(timeout=30).stdout == f"done\n{identity}"
        box.run("timeout 5 bash -c '> /dev/tcp/192.0.2.9/80'")
        assert "192.0.2.9:80/tcp" in {d["target"] for d in box.network()["denials"]}
        (fork,) = box.fork(1)
        with fork:
            assert fork.run("cat /etc/machine-id").stdout != identity
        assert daemon.deaths == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_daemon_that_dies_while_it_copies_a_machine(daemon, state):
    """The machine goes on, the copy is made by the same request, and no part of the first try is left."""
    daemon.start()
    with make(daemon) as box:
        daemon.stop()
        for number in range(1, 40):
            daemon.deaths = 0
            daemon.start(f"kill:{number}")
            (fork,) = box.fork(1, request_id=f"fork-{number}")
            assert fork.run("hostname").stdout == f"{fork.id}\n"
            fork.kill()
            assert box.run("echo goes on").stdout == "goes on\n"
            deaths = daemon.deaths
            daemon.stop()
            if deaths == 0:
                break
        assert 3 < number < 39
        daemon.start()
        assert not list((state / "machines").glob("copies/*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_full_disk_while_a_machine_is_copied(daemon):
    daemon.start()
    with make(daemon) as box:
        errors = []
        for number in range(1, 12):
            daemon.stop()
            daemon.start(f"full:{number}")
            try:
                (fork,) = box.fork(1, request_id=f"full-{number}")
            except HadalError as error:
                errors.append(str(error))
                (fork,) = box.fork(1)
            assert fork.run("echo there").stdout == "there\n"
            fork.kill()
        assert len(errors) > 2
        assert all("No space" in error or "fault at" in error for error in errors), errors
        assert box.run("echo goes on").stdout == "goes on\n"


def test_a_spare_does_not_outlive_its_daemon(daemon, state):
    daemon.start()
    with make(daemon, spare=1) as box:
        until = time.monotonic() + 60
        while len(list((state / "b").iterdir())) < 2:
            assert time.monotonic() < until, "no spare"
            time.sleep(0.1)
        time.sleep(1)
        daemon.kill()
        assert box.run("echo goes on").stdout == "goes on\n"
        assert [path.name for path in (state / "b").iterdir()] == [box.id]


def test_death_of_qemu(daemon):
    daemon.start()
    box = make(daemon)
    running = box.spawn("sleep 60")
    os.kill(qemu_of(box), signal.SIGKILL)
    with pytest.raises(SandboxGoneError) as caught:
        running.wait()
    assert caught.value.cause == GoneCause.CRASHED
    with pytest.raises(SandboxGoneError):
        box.run("true")


def test_death_of_qemu_while_it_is_copied(daemon):
    """Also where it dies at the worst moment: nobody waits for it."""
    daemon.start()
    box = make(daemon)
    pid = qemu_of(box)
    os.kill(pid, signal.SIGSTOP)
    asked = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(HadalError):
        box.fork(1)
    assert time.monotonic() - asked < 15


def works(pid):
    """Ticks of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def stands_still(pid):
    before = works(pid)
    time.sleep(0.5)
    return works(pid) == before


def test_a_paused_machine_stays_paused_when_its_daemon_dies(daemon):
    daemon.start()
    with make(daemon) as box:
        box.spawn("while :; do :; done")
        pid = qemu_of(box)
        assert not stands_still(pid)
        box.pause()
        assert stands_still(pid)
        daemon.kill()
        assert (
            box.info().state == "paused"
        )  # of another daemon, which has asked it meanwhile what runs
        assert stands_still(pid)
        assert box.run("echo on").stdout == "on\n"
        assert not stands_still(pid)
        assert box.info().state == "running"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_daemon_that_dies_while_it_pauses_or_resumes(daemon):
    """At every point: it is paused or it runs, as was said last, and never something between."""
    daemon.start()
    with make(daemon) as box:
        box.spawn("while :; do :; done")
        pid = qemu_of(box)
        daemon.stop()
        for number in range(1, 30):
            daemon.deaths = 0
            daemon.start(f"kill:{number}")
            box.pause()
            assert box.info().state == "paused"
            assert stands_still(pid)
            box.resume()
            assert box.info().state == "running"
            assert not stands_still(pid)
            assert box.run("echo on").stdout == "on\n"
            deaths = daemon.deaths
            daemon.stop()
            if deaths == 0:
                break
        assert 3 < number < 29
        daemon.start()


def test_death_of_qemu_while_it_is_paused(daemon):
    daemon.start()
    box = make(daemon)
    pid = qemu_of(box)
    box.pause()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SandboxGoneError):
        box.run("true")
    assert box.info().state == "gone"


@pytest.mark.parametrize("name", ["memory", "devices", "disks/1"])
def test_a_truncated_snapshot_is_refused(daemon, state, name):
    daemon.start()
    with make(daemon) as box:
        box.run("echo kept > /kept")
        reference = box.snapshot("short", kind="full")
    path = state / "machines/kept/short" / name
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ImageError, match="machine@short is damaged"):
        Sandbox.create(MicroVMSpec(from_=reference), node=daemon.url)
    with make(daemon) as box:
        assert box.snapshot("short", kind="full") == reference  # takes the place of the damaged one
    with Sandbox.create(MicroVMSpec(from_=reference), node=daemon.url) as box:
        assert box.run("echo there").stdout == "there\n"


def test_a_machine_that_does_not_answer(daemon):
    """It is said in time, and a machine that was only slow goes on as if nothing had been asked."""
    daemon.start()
    with make(daemon) as box:
        pid = qemu_of(box)
        os.kill(pid, signal.SIGSTOP)
        asked = time.monotonic()
        with pytest.raises(NodeError, match="does not answer"):
            box.fork(1)
        assert time.monotonic() - asked < 20
        os.kill(pid, signal.SIGCONT)
        assert box.run("echo goes on").stdout == "goes on\n"
        (fork,) = box.fork(1)
        fork.kill()


def test_a_console_that_is_flooded(daemon):
    """Nobody reads it, nobody waits for it, and nobody keeps more than its end."""
    daemon.start()
    with make(daemon) as box:
        status = Path(f"/proc/{daemon.process.pid}/status")

        def resident():
            (line,) = (t for t in status.read_text().splitlines() if t.startswith("VmRSS"))
            return int(line.split()[1])

        before = resident()
        box.run("timeout 4 yes 'a line for the console' > /dev/console")
        assert box.run("echo goes on").stdout == "goes on\n"
        assert resident() - before < 20_000


def test_a_damaged_template_is_made_anew(daemon, state):
    daemon.start()
    make(daemon).kill()
    daemon.stop()
    for memory in (state / "machines/templates").glob("*/memory"):
        os.truncate(memory, memory.stat().st_size // 2)
    daemon.start()
    with make(daemon) as box:
        assert box.run("echo there").stdout == "there\n"
    assert "is damaged" in daemon.log()

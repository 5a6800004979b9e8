"""Death at every point: of the node daemon, of a guest, of a client. Nothing runs twice, nothing is left."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hadal.errors import GoneCause, HadalError, SandboxGoneError
from hadal.node.output import Output
from hadal.sandbox import ContainerSpec, Sandbox
from tests.sandbox.conftest import needs_root

pytestmark = needs_root
KILLS = int(os.environ.get("HADAL_TEST_KILLS", "25"))


class Daemon:
    """A node daemon that is started again whenever it dies, at first with a fault."""

    def __init__(self, state, prefix=(), module="hadal.node"):
        self.prefix = prefix
        self.module = module
        self.state = Path(state)
        self.url = f"unix://{self.state}/node.sock"
        self.deaths = 0
        self.process = None
        self.start_s = 0.0  # of the last start that nobody killed
        self._stopping = False
        self._fault = ""
        self._keeper = None

    def start(self, fault=""):
        self._fault = fault
        self._stopping = False
        self._launch()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _launch(self):
        self.state.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        read, write = os.pipe()
        environment = {**os.environ, "HADAL_FAULT": self._fault}
        self._fault = ""
        with (self.state / "node.log").open("ab") as log:
            arguments = [str(self.state), str(self.state / "node.sock"), str(write)]
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", self.module, *arguments],
                pass_fds=[write], stdout=log, stderr=log, env=environment,
            )  # fmt: skip
        os.close(write)
        with os.fdopen(read) as ready:
            if ready.readline():
                self.start_s = time.monotonic() - began

    def _keep(self):
        while not self._stopping:
            status = self.process.wait()
            if self._stopping:
                return
            self.deaths += 1
            assert status == -signal.SIGKILL, self.log()
            self._launch()

    def kill(self):
        self.process.kill()

    def stop(self):
        self._stopping = True
        self.process.terminate()
        self.process.wait()

    def end(self):
        """Stop it, and end its boxes: those of tests that have failed, too."""
        self._stopping = True
        call = [sys.executable, "-m", "hadal", "node", "stop", "--end-boxes", "--node", self.url]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        self.process.wait()

    def log(self):
        return (self.state / "node.log").read_text()[-4000:]


def left_behind(state):
    """What a node has left on the machine: groups, and files of boxes."""
    name = f"embedded-{Path(state).stat().st_ino}"
    deadline = time.monotonic() + 5  # the end of a box is told before all of it is removed
    while True:
        groups = [str(g) for g in Path("/sys/fs/cgroup").glob(f"*/hadal/{name}/*/")]
        files = [str(p) for folder in "bf" for p in Path(state, folder).iterdir()]
        if not groups + files or time.monotonic() > deadline:
            return groups + files
        time.sleep(0.02)


@pytest.fixture
def daemon(tmp_path):
    # A short path: sockets have little room for one.
    found = Daemon(tmp_path / "n")
    yield found
    found.stop()


def work(url, trajectory, steps):
    """Do some of everything; each step leaves a line in a file, so that a second run of it would show."""
    box = Sandbox.create(
        ContainerSpec(pids=64, memory_mb=64),
        node=url,
        trajectory=trajectory,
        request_id=f"{trajectory}-box",
    )
    box.detach()
    for step in range(steps):
        result = box.run(f"echo {step} >> /log; echo out {step}", request_id=f"{trajectory}-{step}")
        assert result.stdout == f"out {step}\n"
    box.files.write("/f", f"content of {trajectory}")
    [child] = box.fork(request_id=f"{trajectory}-fork")
    assert child.run("cat /f").stdout == f"content of {trajectory}"
    child.kill()
    return box


def check_and_end(box, url, state, steps):
    assert box.run("cat /log").stdout == "".join(f"{step}\n" for step in range(steps))
    log = box.log()
    assert [e.position for e in log] == list(range(1, len(log) + 1))
    assert {e.state for e in log} == {"done"}
    again = Sandbox.create(node=url, trajectory=box.info().trajectory)
    for event in log:
        if event.kind == "command":
            assert again.run(event.request["shell"]).recorded
        elif event.kind == "write":
            again.files.write("/f", f"content of {box.info().trajectory}")
        else:
            break
    box.kill()
    assert left_behind(state) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_point_of_death(daemon):
    """The daemon is killed at its first, second, … point, until a run comes through without one."""
    steps = 3
    for number in range(1, 200):
        daemon.deaths = 0
        daemon.start(f"kill:{number}")
        box = work(daemon.url, f"t{number}", steps)
        deaths = daemon.deaths
        check_and_end(box, daemon.url, daemon.state, steps)
        daemon.stop()
        if deaths == daemon.deaths == 0:
            break
    assert 25 < number < 199, f"{number} points"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_deaths_of_the_daemon(daemon):
    """Killed again and again while several clients work. HADAL_TEST_KILLS says how often."""
    daemon.start()
    rng = random.Random(7)
    failures, boxes = [], []
    done = threading.Event()

    def client(number):
        try:
            box = Sandbox.create(ContainerSpec(pids=64, memory_mb=64), node=daemon.url,
                                 request_id=f"random-{number}")  # fmt: skip
            boxes.append(box)
            step = 0
            while not done.is_set():
                result = box.run(f"echo {step} >> /log; sleep 0.0{step % 10}; echo {step}",
                                 request_id=f"{number}-{step}")  # fmt: skip
                assert result.stdout == f"{step}\n", result
                step += 1
            assert box.run("cat /log").stdout == "".join(f"{s}\n" for s in range(step))
        except Exception as error:  # noqa: BLE001 — told by the test itself
            failures.append(error)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(3)]
    for thread in clients:
        thread.start()
    while len(boxes) < len(clients) and not failures:
        time.sleep(0.01)
    while daemon.deaths < KILLS and not failures:
        # While it starts, and while it works: a machine on which a start takes longer has longer lives.
        time.sleep(rng.uniform(0.05, 0.25 + daemon.start_s * 1.25))
        daemon.kill()
        before, deadline = daemon.deaths, time.monotonic() + 10
        while daemon.deaths == before and time.monotonic() < deadline:
            time.sleep(0.01)
    done.set()
    for thread in clients:
        thread.join(60)
    assert not failures, (failures, daemon.log())
    for box in boxes:
        box.kill()
    assert left_behind(daemon.state) == []


def test_death_of_a_guest(daemon):
    """The box is gone, by name; what was begun is unknown, what was done is kept; nothing is left."""
    daemon.start()
    box = Sandbox.create(node=daemon.url, trajectory="guest")
    box.run("echo before")
    process = box.spawn("sleep 60")
    pids = [
        int(pid)
        for group in Path("/sys/fs/cgroup").glob(f"pids/hadal/*/{box.id}/cgroup.procs")
        for pid in group.read_text().split()
    ]
    os.kill(min(pids), signal.SIGKILL)
    with pytest.raises(SandboxGoneError) as caught:
        process.wait()
    assert caught.value.cause == GoneCause.CRASHED
    with pytest.raises(SandboxGoneError):
        box.run("true")
    assert [e.state for e in box.log()] == ["done", "unknown"]
    with pytest.raises(SandboxGoneError):
        Sandbox.create(node=daemon.url, trajectory="guest")
    assert left_behind(daemon.state) == []


def test_large_output_survives_the_daemon(daemon):
    """What the dead daemon had taken lies in a file; the guest has the rest."""
    daemon.start()
    with Sandbox.create(node=daemon.url) as box:
        line = "for i in 1 2 3 4 5 6 7 8; do seq ${i}00000 ${i}50000; sleep 0.2; done"
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(box.run, line)
            time.sleep(0.5)
            daemon.kill()
            result = running.result(timeout=30)
        whole = "".join(
            f"{n}\n" for i in range(1, 9) for n in range(i * 100000, i * 100000 + 50001)
        )
        assert daemon.deaths == 1
        assert (result.stdout_total, result.truncated) == (len(whole), False)
        assert result.stdout == whole


def test_output_behind_a_gap_is_bounded_and_acknowledged(tmp_path):
    acknowledged = []
    output = Output(tmp_path, "o", lambda *offsets: acknowledged.append(offsets))
    output.output(1, 0, b"a" * 1000)
    for block in range(100):
        output.output(1, 1_000_000 + block * 10_000, b"%02d" % block * 5000)
    assert acknowledged[-1] == (2_000_000, 0)
    whole = output.whole(1)
    assert whole[:1000] == b"a" * 1000
    assert whole.endswith(b"98" * 5000 + b"99" * 5000)
    assert len(whole) == 1000 + 64 * 1024


def test_death_of_a_client(daemon):
    """Its box lives on, its command goes on, and another client finds both."""
    daemon.start()
    code = (
        "from hadal.sandbox import Sandbox\n"
        f"box = Sandbox.create(node={daemon.url!r}, trajectory='client')\n"
        "box.run('echo one >> /log')\n"
        "print('begun', flush=True)\n"
        "box.run('sleep 0.5; echo two >> /log; cat /log')\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with client:
        assert client.stdout.readline() == "begun\n"
        time.sleep(0.2)
        client.kill()
    with Sandbox.create(node=daemon.url, trajectory="client") as box:
        assert box.run("echo one >> /log").recorded
        assert box.run("sleep 0.5; echo two >> /log; cat /log").stdout == "one\ntwo\n"
        assert box.run("cat /log").stdout == "one\ntwo\n"


@pytest.mark.parametrize("number", [3, 6, 7, 9, 12])
def test_a_full_disk_has_a_name(daemon, number):
    """Whatever cannot be written down is not done, and the same request works when there is room."""
    daemon.start(f"full:{number}")
    errors = []
    for _ in range(6):
        try:
            box = work(daemon.url, "full", 3)
            break
        except HadalError as error:
            errors.append(str(error))
    assert len(errors) < 6, errors
    check_and_end(box, daemon.url, daemon.state, 3)
    assert len(errors) <= 1
    assert all("No space" in error or "fault at" in error for error in errors), errors


def test_a_damaged_journal_has_a_name(tmp_path):
    state = tmp_path / "n"
    state.mkdir()
    for content in (b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 8000):
        (state / "journal.db").write_bytes(content)
        found = subprocess.run(
            [sys.executable, "-m", "hadal.node", str(state), str(state / "node.sock"), "1"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        assert found.returncode == 3
        assert "journal.db" in found.stderr
        assert "Traceback" not in found.stderr

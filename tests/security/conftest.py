"""Boxes to attack: a node of these tests alone, programs compiled by this host, and a watch on neighbours."""

import contextlib
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from hadal.sandbox import ContainerSpec, FunctionSpec, Sandbox

PROGRAMS = Path(__file__).with_name("programs")
TIGHT = {"memory_mb": 128, "pids": 128, "cpus": 0.5, "disk_mb": 256, "ttl_s": 300}
"""Of every box of a bomb: should one get out of hand, it is small and short-lived."""


@pytest.fixture(scope="session")
def node(tmp_path_factory, kernel):
    """The state folder of a node, started by the first box; it ends by itself when the tests are over."""
    home = tmp_path_factory.mktemp("hadal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(home))
        yield home / "node"
    log = home / "node/node.log"
    assert "Traceback" not in log.read_text(), log.read_text()[-5000:]


@pytest.fixture
def make(node):
    """Return what makes boxes: tight ones, unless told otherwise. All are ended with the test."""
    with contextlib.ExitStack() as boxes:

        def make(backend="container", **changes):
            kind = {"container": ContainerSpec, "function": FunctionSpec}[backend]
            return boxes.enter_context(Sandbox.create(kind(**TIGHT | changes)))

        yield make


@pytest.fixture
def box(make):
    return make()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Return what compiles a program of this folder and returns its path."""
    folder = tmp_path_factory.mktemp("programs")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to compile the attacks with")

    def compiled(name):
        target = folder / name
        if not target.exists():
            command = ["gcc", "-static", "-O1", "-Wall", "-Wextra", "-pthread", "-o"]
            subprocess.run([*command, target, PROGRAMS / f"{name}.c"], check=True)
        return target

    return compiled


@pytest.fixture
def attack(compiled):
    """Return what runs one of our programs in a box and returns what it printed, as a dict."""

    def attack(box, name, *arguments, **options):
        path = f"/tmp/{name}"
        if not box.files.exists(path):
            box.files.upload(compiled(name), path)
        result = box.run([path, *arguments], **{"timeout_s": 60} | options)
        assert not result.timed_out, result
        return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)

    return attack


class Neighbour:
    """Another box, asked for a command again and again while something happens."""

    def __init__(self, box):
        self.box = box
        self.worst_s = 0.0
        self.rounds = 0
        self._stop = threading.Event()
        self._error = None

    def _ask(self):
        try:
            while self.rounds == 0 or not self._stop.wait(0.05):
                began = time.monotonic()
                result = self.box.run("echo here", timeout_s=30)
                assert result.stdout == "here\n", result
                self.worst_s = max(self.worst_s, time.monotonic() - began)
                self.rounds += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the block that watches raises it
            self._error = error

    def __enter__(self):
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


@pytest.fixture
def neighbour(make, record_property):
    """A block in which a neighbouring box must answer within 2 s, every time."""

    @contextlib.contextmanager
    def neighbour():
        with Neighbour(make(memory_mb=64, pids=32)) as watch:
            yield watch
        record_property("worst_round_trip_s", round(watch.worst_s, 3))
        assert watch.rounds > 0
        assert watch.worst_s < 2, f"a neighbour waited {watch.worst_s:.2f} s"

    return neighbour


def remains(node, box_id):
    """Return what the host still has of a box: its groups and its folder."""
    trees = Path("/sys/fs/cgroup")
    nodes = [n for tree in (trees, *trees.iterdir()) for n in tree.glob("hadal/*")]
    places = [*(n / box_id for n in nodes), node / "b" / box_id]
    return [str(place) for place in places if place.exists()]


@pytest.fixture
def remove(node, record_property):
    """Return what ends a box, within 10 s, and sees that nothing of it is left."""

    def remove(box):
        began = time.monotonic()
        box.kill()
        # The end is told when the box is no more; what it leaves is removed right after.
        while remains(node, box.id) and time.monotonic() - began < 10:
            time.sleep(0.01)
        took = time.monotonic() - began
        record_property("removal_s", round(took, 3))
        assert took < 10, f"the removal took {took:.1f} s"
        assert remains(node, box.id) == []

    return remove

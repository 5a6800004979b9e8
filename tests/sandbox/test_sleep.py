"""Machines that are paused with their memory given back: nothing of them is left in it, and any request wakes them."""

import time
from pathlib import Path

import pytest

from hadal.sandbox import MicroVMSpec, Sandbox
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines, qemu_of
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


def processes(box):
    """Those of a box on the host."""
    groups = Path("/sys/fs/cgroup").glob(f"**/hadal/*/{box.id}/cgroup.procs")
    return {pid for group in groups for pid in group.read_text().split()}


COUNT = "n=0; while [ $n -lt 200 ]; do n=$((n+1)); echo $n; sleep 0.02; done"


def test_a_machine_that_sleeps_has_no_process_and_goes_on_where_it_was(daemon, state):
    daemon.start()
    with make(daemon) as box:
        identity = box.run("cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname").stdout
        box.run("echo kept > /home/f")
        counting = box.spawn(COUNT)
        time.sleep(0.5)
        began = time.monotonic()
        box.pause(reclaim=True)
        print("pause", time.monotonic() - began)
        assert processes(box) == set()
        assert box.info().state == "paused"
        time.sleep(1)
        began = time.monotonic()
        assert box.run("cat /home/f").stdout == "kept\n"
        print("wake", time.monotonic() - began)
        assert box.info().state == "running"
        assert (
            box.run("cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname").stdout
            == identity
        )
        assert abs(time.time() - float(box.run("date +%s.%N").stdout)) < 1
        assert counting.wait().stdout == "".join(f"{n}\n" for n in range(1, 201))
        assert not (state / "b" / box.id / "asleep").exists()
        assert qemu_of(box)

"""Signals that stop and continue everything, in races with what the node starts: nobody waits for ever."""

import contextlib
import time

import pytest

from hadal.errors import CommandRefusedError, SandboxFileError
from tests.sandbox.conftest import needs_root

pytestmark = needs_root


@contextlib.contextmanager
def within(seconds):
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.2f} s"


@pytest.mark.parametrize("kind", ["all", "each"])
@pytest.mark.parametrize("count", ["1", "40"])
def test_a_box_that_stops_all_that_it_can(make, compiled, neighbour, remove, kind, count):
    box = make(pids=64)
    box.files.upload(compiled("stops"), "/tmp/stops")
    assert box.run("nice").stdout == "0\n"  # the init comes before them
    with neighbour():
        attackers = box.spawn(["/tmp/stops", kind, count])
        time.sleep(0.3)
        for _ in range(5):
            with within(2):
                result = box.run("echo here; sleep 0.2; echo there", timeout_s=1)
            assert result.timed_out == "time" or result.stdout == "here\nthere\n", result
            with within(1), contextlib.suppress(SandboxFileError):
                assert box.files.read("/etc/hostname").decode().strip() == box.id
            process = box.spawn("sleep 60")
            time.sleep(0.1)
            with within(1), contextlib.suppress(CommandRefusedError):
                process.kill()
                assert process.wait().signal == 9
            with within(1):
                assert box.usage().pids > 0
        with within(1):
            attackers.kill()
    with within(1.5):
        remove(box)

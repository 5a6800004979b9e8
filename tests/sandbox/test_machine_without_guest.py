"""A machine of whose system nobody knows anything: its disk is empty. Whole systems are in test_debian_machine."""

import pytest

from hadal.errors import UnsupportedError
from hadal.node.machines.disk_images import DiskImages, disk_images_folder
from hadal.sandbox import Sandbox, VMSpec
from tests.sandbox.command_line import CommandLine
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import needs_machines


@needs_root
def test_it_is_listed_counted_and_paused(node):
    needs_machines()
    disks = DiskImages(disk_images_folder(node / "node"))
    disks.make("empty", "the test", lambda path: path.write_bytes(bytes(1 << 20)), guest="none")
    with Sandbox.create(VMSpec(image="disk@empty", memory_mb=128)) as box:
        with pytest.raises(UnsupportedError, match="without a guest program has no commands"):
            box.run("true")
        assert box.usage().memory_bytes > 0
        assert box.id in CommandLine(node).text("box", "ls")
        box.pause(reclaim=True)
        assert box.info().state == "paused"
        assert isinstance(box.console.read(), bytes)
        assert box.info().state == "running"

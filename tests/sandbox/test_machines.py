"""Virtual machines: what makes them different from other boxes."""

import time

import pytest

from hadal.errors import GoneCause, ImageError, SandboxGoneError, UnsupportedError
from hadal.sandbox import MicroVMSpec, Sandbox
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines

pytestmark = needs_root


@pytest.fixture(scope="module")
def image(node, tmp_path_factory):
    needs_machines()
    return import_image(node / "node" / "images", tmp_path_factory.mktemp("image"))


def test_machines_of_one_template_are_not_one_another(node, image):
    """What must differ differs, and the rest is the same: the second and the third are copies."""
    text = "cat /etc/machine-id; hostname; head -c 16 /dev/urandom | sha256sum; date +%s"
    found = []
    for _ in range(3):
        with Sandbox.create(MicroVMSpec(image=image)) as box:
            found.append([*box.run(text).stdout.splitlines(), box.run("uname -r; ls /").stdout])
            assert abs(time.time() - int(found[-1][3])) < 3
            assert found[-1][1] == box.id
    for column in range(3):
        assert len({row[column] for row in found}) == 3
    assert len({row[4] for row in found}) == 1


def test_what_one_machine_writes_no_other_has(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as first:
        first.run(
            "echo mine > /home/f; head -c 30000000 /dev/zero | tail -c 1 > /dev/null; sync",
            check=True,
        )
        with Sandbox.create(MicroVMSpec(image=image)) as second:
            assert second.run("ls -A /home/f").exit_code != 0
        assert first.files.read("/home/f") == b"mine\n"


def test_a_kernel_that_panics_is_told(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        with pytest.raises(SandboxGoneError) as caught:
            box.run("echo c > /proc/sysrq-trigger; sleep 60")
        assert caught.value.cause == GoneCause.CRASHED


def test_what_a_machine_cannot_do_is_said(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        with pytest.raises(UnsupportedError, match="disk"):
            box.changes()
        with pytest.raises(UnsupportedError, match="fork"):
            box.fork(1)


def test_the_host_is_no_image_of_a_machine(node):
    with pytest.raises(ImageError, match="cannot be the disks") as caught:
        Sandbox.create(MicroVMSpec())
    assert "import" in caught.value.hint

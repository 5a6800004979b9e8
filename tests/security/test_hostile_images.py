"""Images that lie: links where directories belong, devices, and directories that change while a box starts."""

import contextlib
import os
import stat
import threading
from pathlib import Path

import pytest

from hadal.errors import HadalError
from hadal.sandbox import ContainerSpec, Sandbox
from tests.sandbox.conftest import needs_root
from tests.security.conftest import TIGHT

pytestmark = needs_root
DIRECTORIES = ("usr", "etc", "tmp", "proc", "sys", "dev", "root", "var", "run", "x")


@pytest.fixture
def image(tmp_path):
    root = tmp_path / "image"
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return root


@pytest.fixture
def outside(tmp_path):
    """A directory of the host with what a box would find or leave if a link led out of it."""
    folder = tmp_path / "outside"
    for name in ("hadal", "etc"):
        (folder / name).mkdir(parents=True)
    (folder / "hostname").write_text("untouched")
    folder.chmod(0o777)
    return folder


def state(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def start(image):
    """Make a box of this image, which has no program but what we copy into it."""
    mounts = [{"source": "/usr", "target": "/usr"}]
    return Sandbox.create(ContainerSpec(image=str(image), mounts=mounts, **TIGHT))


def replace(image, name, target):
    path = image / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir() if name != "etc" else None
        if name == "etc":
            (path / "passwd").unlink()
            path.rmdir()
    path.symlink_to(target)


@pytest.mark.parametrize(
    "target",
    ["{outside}", "../../../../../../../..{outside}", "/x", "/proc", "/dev", "/proc/self/root"],
)
@pytest.mark.parametrize("name", ["proc", "dev", "sys", "etc", "tmp", "run"])
def test_links_lead_nowhere_else(node, image, outside, name, target):
    """CVE-2025-31133, 52565 and 52881: what is mounted or written at start went where a link said."""
    before = state(outside)
    replace(image, name, target.format(outside=outside))
    with contextlib.suppress(HadalError), start(image) as box:  # to refuse it is as good
        result = box.run(["/usr/bin/sh", "-c", "echo x > /proc/sys/kernel/core_pattern; echo x > /proc/sysrq-trigger;"
                          " echo x > /tmp/f; cat /proc/kcore | head -c 10; cat /proc/1/environ"])  # fmt: skip
        assert result.stdout == ""
    assert state(outside) == before


@pytest.mark.parametrize(
    "path", ["dev/null", "etc/hostname", "etc/hosts", "etc/passwd", "dev/pts", "dev/ptmx"]
)
def test_files_that_are_links_are_not_followed(node, image, outside, path):
    before = state(outside)
    (image / path).unlink(missing_ok=True)
    (image / path).symlink_to(outside / "hostname")
    with contextlib.suppress(HadalError), start(image) as box:
        box.files.write("/etc/hostname", "written by the box")
    assert state(outside) == before


@pytest.mark.parametrize("name", ["proc", "dev", "sys", "etc"])
def test_files_where_directories_belong_are_an_error_with_a_name(node, image, name):
    replace(image, name, "/x")
    (image / name).unlink()
    (image / name).write_text("a file")
    with pytest.raises(HadalError, match="cannot make a box"):
        start(image)


def test_devices_of_an_image_do_not_open(node, image):
    """A device is no use wherever it is: in a layer, on a path through a link, or renamed."""
    for name, kind, device in (("zero", stat.S_IFCHR, (1, 5)), ("loop", stat.S_IFBLK, (7, 0))):
        os.mknod(image / "x" / name, kind | 0o666, os.makedev(*device))
        (image / "x" / name).chmod(0o666)
    (image / "tmp/link").symlink_to("/x/zero")
    with start(image) as box:
        for path in ("/x/zero", "/x/loop", "/tmp/link", "/proc/self/cwd/x/zero"):
            result = box.run(["/usr/bin/head", "-c", "1", path])
            assert result.exit_code != 0, path
            assert "Permission denied" in result.stderr, path
        box.run(["/usr/bin/mv", "/x/zero", "/tmp/moved"])
        assert box.run(["/usr/bin/head", "-c", "1", "/tmp/moved"]).exit_code != 0


def test_the_user_database_may_say_anything(node, image):
    """/etc/passwd as a FIFO, a device, a directory: commands end, as an error or not."""
    (image / "etc/passwd").unlink()
    os.mkfifo(image / "etc/passwd")
    with start(image) as box:
        assert box.run(["/usr/bin/id", "-u"], timeout_s=10).stdout == "0\n"
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("/dev/zero")
    with start(image) as box:
        assert box.run(["/usr/bin/id", "-u"], timeout_s=10).stdout == "0\n"


@pytest.mark.slow
def test_a_directory_that_changes_while_boxes_start(node, image, outside):
    """Masks and mounts are put where they belong, or the box is refused; never anywhere else."""
    before, stop = state(outside), threading.Event()
    links = [(image / "proc", "/x"), (image / "dev", f"{outside}"), (image / "sys", "/proc")]

    def flip():
        while not stop.is_set():
            for path, target in links:
                with contextlib.suppress(OSError):
                    path.rmdir()
                    path.symlink_to(target)
                    path.unlink()
                    path.mkdir()

    thread = threading.Thread(target=flip)
    thread.start()
    made = 0
    try:
        for _ in range(60):
            with contextlib.suppress(HadalError), start(image) as box:
                made += 1
                result = box.run(["/usr/bin/sh", "-c",
                    "for p in /proc /x /sys; do echo x > $p/sys/kernel/core_pattern;"
                    " echo x > $p/sysrq-trigger; head -c 4 $p/kcore; done 2>/dev/null; mount | grep -c kcore"])  # fmt: skip
                assert "ELF" not in result.stdout
    finally:
        stop.set()
        thread.join()
    assert Path("/proc/sys/kernel/core_pattern").read_text() != "x\n"
    assert state(outside) == before

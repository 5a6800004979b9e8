"""A whole Debian with its own kernel and systemd, booted from a disk by BIOS, and used as any other box."""

import asyncio
import struct
import subprocess
import time

import pytest

from hadal.errors import UnsupportedError
from hadal.node.images import ImageStore
from hadal.node.images.tree import remove_tree
from hadal.node.machines.bootable import make_bootable
from hadal.node.machines.disk_images import DiskImages, disk_images_folder
from hadal.sandbox import Sandbox, VMSpec
from tests.sandbox.conftest import needs_root
from tests.sandbox.debian_lab import find_mirrors
from tests.sandbox.machine_image import needs_machines
from tests.sandbox.network_lab import needs_network

pytestmark = [needs_root, needs_network, pytest.mark.slow, pytest.mark.timeout(1500)]

PACKAGES = "linux-image-amd64,systemd-sysv,udev,kmod,iproute2,procps,python3-minimal"
PASSWORD = "correct-horse-9"


@pytest.fixture(scope="module")
def mirrors():
    needs_machines()
    return find_mirrors()


@pytest.fixture(scope="module")
def debian(node, mirrors, tmp_path_factory):
    """The disk, made of an image that debootstrap has made."""
    root = tmp_path_factory.mktemp("debian") / "root"
    command = [
        "debootstrap", "--variant=minbase", f"--include={PACKAGES}", mirrors.suite, str(root), mirrors.debian,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        pytest.skip(f"debootstrap: {(result.stdout + result.stderr).strip()[-200:]}")
    state = node / "node"

    async def make():
        store = ImageStore(state / "images")
        await store.import_directory(root, "debian")
        image = await store.acquire("debian")
        disks = DiskImages(disk_images_folder(state))
        disks.make("debian", "the test", lambda path: make_bootable(image.layers, path, 2048))
        await store.release(image)
        await store.close()

    asyncio.run(make())
    remove_tree(root)
    return "disk@debian"


def start(image, **changes):
    return Sandbox.create(VMSpec(**{"image": image, "memory_mb": 512} | changes))


@pytest.fixture(scope="module")
def box(debian):
    with start(debian) as box:
        yield box


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.3)


def test_it_is_a_whole_system(box):
    assert box.run("cat /proc/1/comm").stdout == "systemd\n"
    kernel = box.run("uname -r").stdout.strip()
    assert box.files.exists(f"/boot/vmlinuz-{kernel}")
    assert box.run("systemctl is-system-running").stdout == "running\n"
    assert box.run("findmnt -no SOURCE,FSTYPE /").stdout.split() == ["/dev/vda1", "ext4"]
    assert "login:" in box.run("cat /dev/vcs1").stdout
    assert box.run("hostname").stdout.strip() == box.id


def test_commands_files_and_limits_are_those_of_a_box(box):
    box.files.write("/srv/a/b.txt", "text", parents=True)
    assert box.run("cat /srv/a/b.txt; exit 5").describe()
    result = box.run("echo out; echo err >&2; exit 5", user="nobody")
    assert (result.exit_code, result.stdout, result.stderr) == (5, "out\n", "err\n")
    assert box.run("sleep 60", timeout_s=1).timed_out == "time"
    assert not box.run("pgrep sleep").stdout
    assert box.usage().memory_bytes > 50 << 20


def test_others_start_as_it_was_when_it_had_booted(debian, box):
    """The second does not boot: its clock of uptime has gone on from the first one's."""
    with start(debian) as other:
        assert float(other.run("cat /proc/uptime").stdout.split()[0]) > 5
        assert not other.files.exists("/srv/a")
        for command in ("hostname", "cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id"):
            assert other.run(command).stdout != box.run(command).stdout


def test_typing_logs_in_and_the_screen_shows_it(debian):
    with start(debian) as box:
        box.run("chpasswd", stdin=f"root:{PASSWORD}\n", check=True)
        before = box.screenshot()
        width, height = struct.unpack(">II", before[16:24])
        assert (width, height) > (640, 400)  # of its own driver, not the firmware's
        box.keyboard.press("Enter")
        box.keyboard.type("root\n")
        until(lambda: "Password:" in box.run("cat /dev/vcs1").stdout)
        box.keyboard.type(f"{PASSWORD}\n")
        until(lambda: "root@" in box.run("cat /dev/vcs1").stdout)
        box.keyboard.type("echo 'It|Works: 100%' > /srv/typed\n")
        until(lambda: box.files.exists("/srv/typed"))
        assert box.files.read("/srv/typed") == b"It|Works: 100%\n"
        after = box.screenshot()
        assert after != before
        (copy,) = box.fork()
        with copy:
            assert "root@" in copy.run("cat /dev/vcs1").stdout
            assert len(copy.screenshot()) > len(before) / 2  # not the black one of an empty screen


def test_the_mouse_arrives(debian):
    find = "grep -l 'QEMU USB Tablet' /sys/class/input/event*/device/name | cut -d/ -f5"
    with start(debian) as box:
        event = box.run(find, check=True).stdout.split()[0]
        reading = box.spawn(["head", "-c", "72", f"/dev/input/{event}"], timeout_s=30)
        until(lambda: box.run("pgrep head").stdout)
        box.mouse.click(100, 200)
        records = [
            struct.unpack_from("<QQHHi", reading.wait().stdout_bytes, 24 * n) for n in range(3)
        ]
        assert {(kind, code) for _, _, kind, code, _ in records} >= {
            (3, 0),
            (3, 1),
        }  # EV_ABS: X and Y


def test_it_reaches_what_its_policy_allows(debian, mirrors):
    with start(debian, network=mirrors.debian_only) as box:
        said = box.run(
            "apt-get update && apt-get install -y --no-install-recommends cowsay", timeout_s=300
        )
        assert said.ok, said.stdout[-2000:] + said.stderr[-2000:]
        assert "moo" in box.run("/usr/games/cowsay moo").stdout


def test_a_fork_goes_on_with_all_that_runs(debian):
    with start(debian) as box:
        box.run("nohup sh -c 'while :; do date >> /srv/ticks; sleep 0.2; done' >/dev/null 2>&1 &")
        until(lambda: box.files.exists("/srv/ticks"))
        (copy,) = box.fork()
        with copy:
            ticks = len(copy.files.read("/srv/ticks"))
            until(lambda: len(copy.files.read("/srv/ticks")) > ticks)
            assert copy.run("hostname").stdout.strip() == copy.id


def test_its_disk_is_kept_and_boots(debian):
    with start(debian) as box:
        box.files.write("/srv/kept", "yes")
        reference = box.snapshot("kept")
        assert reference == "disk@kept"
        with pytest.raises(UnsupportedError, match="it is no image of files"):
            box.changes()
    with start(reference) as again:
        assert again.files.read("/srv/kept") == b"yes"
        assert again.run("systemctl is-system-running --wait").stdout == "running\n"


def test_a_whole_machine_is_kept_with_what_runs(debian):
    with start(debian) as box:
        box.run("sh -c 'sleep 12345 &' >/dev/null 2>&1")
        reference = box.snapshot("debian-ready", kind="full")
    with Sandbox.create(VMSpec(from_=reference, memory_mb=512)) as again:
        assert again.run("pgrep -f 'sleep 12345'").ok

"""A whole Debian with its own kernel and systemd, booted from a disk by BIOS and by UEFI, and used as any other box.

With our guest program on its disk; with cloud-init, which installs it; and without, from outside alone.
"""

import asyncio
import struct
import subprocess
import time

import pytest

from hadal.errors import ConfigError, GoneCause, SandboxGoneError, UnsupportedError
from hadal.node.images import ImageStore
from hadal.node.images.tree import remove_tree
from hadal.node.machines.bootable import make_bootable
from hadal.node.machines.disk_images import DiskImages, disk_images_folder
from hadal.sandbox import NetworkPolicy, Sandbox, VMSpec
from tests.sandbox.command_line import CommandLine
from tests.sandbox.conftest import needs_root
from tests.sandbox.debian_lab import find_mirrors
from tests.sandbox.machine_image import needs_machines
from tests.sandbox.network_lab import needs_network

pytestmark = [
    needs_root,
    needs_network,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(1500),
]

PACKAGES = (
    "linux-image-amd64,systemd-sysv,udev,kmod,iproute2,procps,python3-minimal"
    # What debootstrap does not find by itself: a name that a package of cloud-init's provides.
    ",cloud-init,python3-cffi-backend"
)
PASSWORD = "correct-horse-9"
GUESTS = {"debian": "installed", "cloud": "cloud-init", "bare": "none"}


def disks_of(state):
    return {disk.reference: disk.guest for disk in DiskImages(disk_images_folder(state)).list()}


@pytest.fixture(scope="module")
def mirrors():
    needs_machines()
    return find_mirrors()


@pytest.fixture(scope="module")
def disks(node, mirrors, tmp_path_factory):
    """The disks, made of an image that debootstrap has made: with each way to the guest program."""
    root = tmp_path_factory.mktemp("debian") / "root"
    command = [
        "debootstrap", "--variant=minbase", f"--include={PACKAGES}", mirrors.suite, str(root), mirrors.debian,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        pytest.skip(f"debootstrap: {(result.stdout + result.stderr).strip()[-200:]}")
    subprocess.run(
        ["chroot", str(root), "chpasswd"], input=f"root:{PASSWORD}\n", text=True, check=True
    )
    state = node / "node"

    async def make():
        store = ImageStore(state / "images")
        await store.import_directory(root, "debian")
        image = await store.acquire("debian")
        disks = DiskImages(disk_images_folder(state))
        for name, guest in GUESTS.items():
            disks.make(
                name,
                "the test",
                lambda path, guest=guest: make_bootable(
                    image.layers, path, 2048, with_guest=guest == "installed"
                ),
                guest=guest,
            )
        await store.release(image)
        await store.close()

    asyncio.run(make())
    remove_tree(root)
    return disks_of(state)


@pytest.fixture(scope="module")
def debian(disks):
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


def test_it_boots_by_uefi(debian):
    """Its disk has what both kinds of firmware start; what one boots by is another machine, with a template of its own."""
    with start(debian, firmware="uefi") as box:
        assert box.run("cat /sys/firmware/efi/fw_platform_size").stdout == "64\n"
        assert box.run("systemctl is-system-running --wait").stdout == "running\n"
        uptime = float(box.run("cat /proc/uptime").stdout.split()[0])
        assert box.snapshot("by-uefi") == "disk@by-uefi"
        reference = box.snapshot("uefi-now", kind="full")
    with start(debian, firmware="uefi") as other:
        assert abs(float(other.run("cat /proc/uptime").stdout.split()[0]) - uptime) < 30
    with Sandbox.create(VMSpec(from_=reference, memory_mb=512)) as again:
        assert again.files.exists("/sys/firmware/efi")


def test_cloud_init_installs_the_guest_program(disks):
    with start("disk@cloud", network=NetworkPolicy()) as box:
        assert box.run("cloud-init status --wait").stdout.strip() == "status: done"
        assert box.run("systemctl is-system-running --wait").stdout == "running\n"
        assert box.run("hostname").stdout.strip() == box.id
        assert box.run("mount").stdout.count("vfat") == 0
        assert " inet " in box.run("ip -4 addr show dev eth0").stdout
        box.files.write("/srv/kept", "yes")
        reference = box.snapshot("from-cloud")
    with start("disk@cloud", network=NetworkPolicy()) as other:  # from the template
        assert not other.files.exists("/srv/kept")
    with start(reference) as again:  # whose own service it is now
        assert again.files.read("/srv/kept") == b"yes"


class Terminal:
    """The serial console of a box, as somebody sits at it."""

    def __init__(self, box):
        self.box = box

    def await_text(self, text, seconds=400):
        until(lambda: text in self.box.console.read(), seconds)

    def say(self, line, answer):
        self.box.console.type(f"{line}\n")
        self.await_text(answer)


@pytest.fixture(scope="module")
def bare(disks):
    """A machine without a guest program, at whose serial console root is logged in."""
    with start("disk@bare") as box:
        terminal = Terminal(box)
        terminal.await_text(b"login:")
        terminal.say("root", b"Password:")
        terminal.say(PASSWORD, b"root@")
        yield box


def test_a_system_without_the_guest_program_is_used_from_outside(bare):
    Terminal(bare).say("echo $((6 * 7))x", b"42x")
    assert struct.unpack(">II", bare.screenshot()[16:24]) > (640, 400)
    bare.keyboard.press("Enter")
    typed = [event.request for event in bare.log() if event.kind == "input"]
    assert {"console": "echo $((6 * 7))x\n"} in typed
    assert {"press": "Enter"} in typed


def test_what_needs_the_guest_program_is_refused(bare):
    for work in (
        lambda: bare.run("true"),
        lambda: bare.files.read("/etc/hostname"),
        lambda: bare.spawn(["true"]),
    ):
        with pytest.raises(UnsupportedError, match="without a guest program") as caught:
            work()
        assert "screen" in caught.value.hint
    with pytest.raises(ConfigError, match="nobody to tell its address"):
        start("disk@bare", network=NetworkPolicy())
    assert "commands" not in bare.info().capabilities


def test_it_is_paused_copied_and_kept_all_the_same(bare):
    bare.pause()
    Terminal(bare).say("marker=$((7 * 7))", b"marker")
    (copy,) = bare.fork()
    with copy:
        Terminal(copy).say("echo =$marker=", b"=49=")
    kept, disk = bare.snapshot("bare-now", kind="full"), bare.snapshot("bare-disk")
    assert disk == "disk@bare-disk"
    with Sandbox.create(VMSpec(from_=kept, memory_mb=512)) as again:
        Terminal(again).say("echo +$marker+", b"+49+")
    Terminal(bare).say("echo -$marker-", b"-49-")


def test_a_daemon_that_is_started_anew_finds_it(bare, node):
    """What it said before is forgotten, and all else is there."""
    CommandLine(node).text("node", "stop")
    with Sandbox.connect(bare.id) as again:
        assert again.console.read() == b""
        Terminal(again).say("echo $((9 * 9))y", b"81y")


def test_the_console_of_others_is_the_nodes(box):
    with pytest.raises(UnsupportedError, match="the node's"):
        box.console.read()
    with pytest.raises(UnsupportedError, match="the node's"):
        box.console.type("x")


def test_it_is_gone_when_it_switches_itself_off(bare):
    """The last of them: it is not there any more."""
    bare.console.type("poweroff -ff\n")

    def gone():
        try:
            bare.console.read()
        except SandboxGoneError as error:
            return error.cause == GoneCause.CRASHED
        return False

    until(gone)

"""Disk images: added, made, replaced and removed; what is none is refused. No machine is started."""

import json
import shutil
import struct
import subprocess

import pytest

from hadal.errors import ConfigError, ImageError, NodeError, UnsupportedError
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore
from hadal.node.machines.bootable import find_tools, make_bootable
from hadal.node.machines.choice import Choice
from hadal.node.machines.disk_images import DiskImages
from hadal.node.machines.fat import make_fat
from hadal.node.machines.guest_service import make_seed
from hadal.node.machines.machines import Machines
from hadal.sandbox import NetworkPolicy, VMSpec
from hadal.sandbox.specs import read_spec
from tests.sandbox.command_line import CommandLine

MIB = 1 << 20
needs_fat = pytest.mark.skipif(
    not (shutil.which("mkfs.fat") and shutil.which("mcopy")), reason="no dosfstools or mtools"
)
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="there is no qemu-img")


@pytest.fixture
def disks(tmp_path):
    return DiskImages(tmp_path / "machines/disks")


def content(path):
    return path.read_bytes()


@needs_qemu_img
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_file_is_added_as_it_is(disks, tmp_path, kind):
    raw, given = tmp_path / "raw", tmp_path / "given"
    raw.write_bytes(b"boot" + bytes(MIB - 4))
    subprocess.run(["qemu-img", "convert", "-O", kind, raw, given], check=True)
    made = disks.add_file("one", given)
    assert (made.reference, made.size) == ("disk@one", MIB)
    assert content(disks.disks("disk@one") / "0") == content(raw)
    assert disks.find("disk@one").stored < MIB
    again = disks.add_file("one", given)
    assert [disk.id for disk in disks.list()] == [again.id] != [made.id]
    disks.remove("disk@one")
    assert disks.list() == []
    with pytest.raises(ImageError, match="no disk image disk@one"):
        disks.find("disk@one")
    assert [path.name for path in (tmp_path / "machines/disks").iterdir()] == []


@needs_qemu_img
def test_a_disk_that_leads_to_other_files_is_refused(disks, tmp_path):
    secret, leading = tmp_path / "secret", tmp_path / "leading"
    secret.write_bytes(bytes(MIB))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", leading], check=True
    )
    with pytest.raises(ConfigError, match="stands on another file"):
        disks.add_file("one", leading)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", leading, "1M"], check=True
    )  # fmt: skip
    with pytest.raises(ConfigError, match="stands on another file"):
        disks.add_file("one", leading)
    assert disks.list() == []


@needs_qemu_img
def test_what_is_no_disk_is_refused(disks, tmp_path):
    odd = tmp_path / "odd"
    odd.write_bytes(b"KDMV" + bytes(508))
    with pytest.raises(ConfigError, match="raw or qcow2"):
        disks.add_file("one", odd)
    odd.write_bytes(b"")
    with pytest.raises(ConfigError, match="no whole sectors"):
        disks.add_file("one", odd)
    with pytest.raises(ConfigError, match="no disk image"):
        disks.add_file("one", tmp_path / "missing")
    for name in ("", ".hidden", "a/b", " a", "a\nb", "x" * 200):
        with pytest.raises(ConfigError, match="can be called"):
            disks.add_file(name, odd)
    assert list((tmp_path / "machines/disks").glob(".*")) == []


def test_a_write_that_fails_leaves_nothing(disks, tmp_path):
    def full(path):
        path.write_bytes(bytes(512))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        disks.make("one", "nothing", full)
    assert list((tmp_path / "machines/disks").iterdir()) == []


def test_a_damaged_description_is_named(disks):
    disks.make("one", "zeros", lambda path: path.write_bytes(bytes(MIB)))
    (disks.disks("disk@one").parent / "about.json").write_text("{")
    with pytest.raises(ImageError, match="disk@one is damaged"):
        disks.find("disk@one")
    assert disks.list() == []


def test_an_image_without_a_kernel_makes_no_disk(tmp_path):
    try:
        find_tools()
    except UnsupportedError as error:
        pytest.skip(f"{error}")
    (tmp_path / "layer/boot").mkdir(parents=True)
    (tmp_path / "layer/boot/vmlinuz-6.1").write_bytes(b"")  # and no initial RAM disk
    with pytest.raises(ImageError, match="no kernel with an initial RAM disk"):
        make_bootable((tmp_path / "layer",), tmp_path / "disk", 64)
    assert not (tmp_path / "disk").exists()


def test_a_spec_says_what_a_disk_is_for():
    for backend in ("container", "function", "microvm"):
        with pytest.raises(ConfigError, match="backend vm"):
            read_spec({"backend": backend, "image": "disk@one"})
    for name, value in (("disk_mb", 100), ("pids", 50), ("inodes", 1000), ("shm_mb", 128)):
        with pytest.raises(ConfigError, match=f"{name}: what disk@one has of it"):
            read_spec({"backend": "vm", "image": "disk@one", name: value})
    spec = read_spec({"backend": "vm", "image": "disk@one", "memory_mb": 512})
    assert read_spec(spec.model_dump(mode="json", by_alias=True)) == spec


def test_a_disk_says_what_a_spec_does_not(disks, tmp_path):
    images = ImageStore(tmp_path / "images")
    machines = Machines(tmp_path / "machines", images, None, None, None, Choice("tcg", "qemu"))
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    disks.add_file("one", file, firmware="uefi", guest="none")
    spec = machines.resolved(VMSpec(image="disk@one"))
    assert (spec.firmware, spec.guest) == ("uefi", "none")
    assert "commands" not in spec.can
    other = machines.resolved(VMSpec(image="disk@one", guest="cloud-init"))
    assert (other.firmware, other.guest) == ("uefi", "cloud-init")
    assert other.can == VMSpec.capabilities
    with pytest.raises(ConfigError, match="nobody to tell its address"):
        machines.resolved(VMSpec(image="disk@one", network=NetworkPolicy()))
    with pytest.raises(ImageError, match="no disk image disk@two"):
        machines.resolved(VMSpec(image="disk@two"))
    untouched = VMSpec(image="host")
    assert machines.resolved(untouched) is untouched


def test_firmware_and_guest_are_those_of_a_disk():
    for name, value in (("firmware", "uefi"), ("guest", "none")):
        with pytest.raises(ConfigError, match="host is none"):
            read_spec({"backend": "vm", "image": "host", name: value})
        with pytest.raises(ConfigError, match=name):
            read_spec({"backend": "microvm", name: value})
    with pytest.raises(ConfigError, match="no spares"):
        read_spec({"backend": "vm", "image": "disk@one", "guest": "none", "spare": 1})


@needs_fat
def test_a_seed_has_the_guest_program_and_is_made_once(tmp_path):
    seed = make_seed(tmp_path / "machines")
    assert make_seed(tmp_path / "machines") == seed
    assert [path.name for path in seed.parent.iterdir()] == [seed.name]
    read = ["mcopy", "-i", seed, "-n"]
    subprocess.run([*read, "::guest", tmp_path / "guest"], check=True)
    assert content(tmp_path / "guest") == content(guest_program())
    said = subprocess.run([*read, "::user-data", "-"], capture_output=True, check=True).stdout
    head, _, config = said.partition(b"\n")
    assert head == b"#cloud-config"
    (script,) = json.loads(config)["runcmd"]
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


@needs_fat
def test_a_file_system_that_is_too_small_is_said_so(tmp_path):
    with pytest.raises(NodeError, match="mcopy fails"):
        make_fat(tmp_path / "small", 1, "SMALL", {"a/b": bytes(2 * MIB)})


def test_a_host_without_the_tools_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for work in (find_tools, lambda: make_fat(tmp_path / "a", 1, "A", {})):
        with pytest.raises(UnsupportedError) as caught:
            work()
        assert "apt-get install" in caught.value.hint


@needs_qemu_img
def test_the_command_line(tmp_path):
    hadal = CommandLine(tmp_path)
    file, state = tmp_path / "file", tmp_path / "state"
    file.write_bytes(struct.pack("<510xH", 0xAA55) + bytes(MIB - 512))
    options = ["--firmware", "uefi", "--guest", "cloud-init", "--state", state, "--json"]
    made = json.loads(hadal.text("disk", "add", "one", file, *options))
    assert (made["reference"], made["firmware"], made["guest"]) == (
        "disk@one",
        "uefi",
        "cloud-init",
    )
    table = hadal.text("disk", "ls", "--state", state)
    assert {"disk@one", "uefi", "cloud-init"} <= set(table.split())
    found = json.loads(hadal.text("disk", "ls", "--state", state, "--json"))
    assert (found["size"], found["source"]) == (MIB, str(file))
    hadal.text("disk", "rm", "disk@one", "--state", state)
    assert hadal.text("disk", "ls", "--state", state, "--json") == ""

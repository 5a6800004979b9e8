"""Disk images: added, made, replaced and removed; what is none is refused. No machine is started."""

import json
import shutil
import struct
import subprocess

import pytest

from hadal.errors import ConfigError, ImageError
from hadal.node.machines.bootable import make_bootable
from hadal.node.machines.disk_images import DiskImages
from hadal.sandbox.specs import read_spec
from tests.sandbox.command_line import CommandLine

MIB = 1 << 20
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
    if shutil.which("grub-mkimage") is None or not shutil.which("mke2fs"):
        pytest.skip("there is no GRUB (Debian: grub-pc-bin)")
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


@needs_qemu_img
def test_the_command_line(tmp_path):
    hadal = CommandLine(tmp_path)
    file, state = tmp_path / "file", tmp_path / "state"
    file.write_bytes(struct.pack("<510xH", 0xAA55) + bytes(MIB - 512))
    made = json.loads(hadal.text("disk", "add", "one", file, "--state", state, "--json"))
    assert made["reference"] == "disk@one"
    table = hadal.text("disk", "ls", "--state", state)
    assert "disk@one" in table
    assert str(file)[:20] in table.replace("\n", "")
    assert json.loads(hadal.text("disk", "ls", "--state", state, "--json"))["size"] == MIB
    hadal.text("disk", "rm", "disk@one", "--state", state)
    assert hadal.text("disk", "ls", "--state", state, "--json") == ""

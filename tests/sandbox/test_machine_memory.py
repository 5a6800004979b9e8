"""The memory of machines, and templates: what is written is what was there, and damage is seen."""

import json
import mmap
import os
import shutil
import subprocess
import sys

import pytest

from hadal.errors import NodeError, UnsupportedError
from hadal.node.machines import memory
from hadal.node.machines.snapshots import Overlays, Templates, link_disks, save_machine
from hadal.node.sparse import copy_file, copy_not_zero, put_not_zero
from tests.sandbox.conftest import needs_root

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE

# Maps the memory as QEMU does, writes pages of it, and waits.
_HOLDER = """
import mmap, sys
size, shared = int(sys.argv[1]), sys.argv[2] == "shared"
with open("/proc/self/fd/%s" % sys.argv[3], "r+b") as file:
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    memory = mmap.mmap(file.fileno(), size, flags=flags)
for page in map(int, sys.argv[4:]):
    memory[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE] = bytes([page + 1]) * mmap.PAGESIZE
memory[0:1]
print("ready", flush=True)
sys.stdin.read()
"""


def holder(descriptor, kind, *pages):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(SIZE), kind, str(descriptor), *map(str, pages)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor],
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    return process


def content(pages):
    return b"".join(bytes([pages.get(n, 0)]) * PAGE for n in range(SIZE // PAGE))


@needs_root
@pytest.mark.parametrize("kind", ["shared", "private"])
def test_what_a_process_has_is_written(tmp_path, kind):
    if kind == "shared":
        base, pages = memory.empty_memory(SIZE), {}
    else:
        (tmp_path / "base").write_bytes(content({3: 7, 40: 8}))
        base, pages = memory.load_memory(tmp_path / "base"), {3: 7, 40: 8}
    with holder(base, kind, 0, 1, 40, 63) as process:
        copy = memory.copy_memory(process.pid, base)
        process.stdin.close()
    assert os.pread(copy, SIZE + 1, 0) == content(pages | {0: 1, 1: 2, 40: 41, 63: 64})
    with pytest.raises(PermissionError):
        os.pwrite(copy, b"x", 0)
    os.close(copy)
    os.close(base)


@needs_root
@pytest.mark.parametrize("kind", ["shared", "private"])
def test_what_a_process_has_is_saved_without_its_zeros(tmp_path, kind):
    (tmp_path / "base").write_bytes(content({3: 7, 40: 8}))
    base = memory.load_memory(tmp_path / "base", sealed=False)
    with holder(base, kind, 0, 1, 40, 63) as process, (tmp_path / "saved").open("wb+") as file:
        memory.save_memory(process.pid, base, file.fileno())
        process.stdin.close()
    assert (tmp_path / "saved").read_bytes() == content({0: 1, 1: 2, 3: 7, 40: 41, 63: 64})
    assert (tmp_path / "saved").stat().st_blocks * 512 < 16 * PAGE
    os.close(base)


def test_parts_of_a_file_are_written_over(tmp_path):
    with (tmp_path / "f").open("wb+") as file:
        file.truncate(8 * PAGE)
        put_not_zero(file.fileno(), PAGE, b"a" * PAGE + bytes(PAGE) + b"b" * PAGE)
        put_not_zero(file.fileno(), 0, bytes(2 * PAGE) + b"c" * PAGE)
    text = bytes(2 * PAGE) + b"c" * PAGE + b"b" * PAGE + bytes(4 * PAGE)
    assert (tmp_path / "f").read_bytes() == text


@needs_root
def test_the_memory_that_a_process_was_started_with_is_found(tmp_path):
    base = memory.empty_memory(SIZE)
    call = [sys.executable, "-c", "print('ready', flush=True); input()"]
    for given, found in ((base, True), (os.open("/dev/null", os.O_RDONLY), False)):
        with subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False,
            preexec_fn=lambda given=given: os.dup2(given, memory.DESCRIPTOR),
        ) as process:  # fmt: skip
            process.stdout.readline()
            if found:
                again = memory.memory_of(process.pid)
                assert os.fstat(again).st_ino == os.fstat(base).st_ino
                os.close(again)
            else:
                with pytest.raises(NodeError, match="something else"):
                    memory.memory_of(process.pid)
            process.stdin.close()
    with pytest.raises(NodeError, match="no memory"):
        memory.memory_of(process.pid)
    os.close(base)


@needs_root
def test_a_process_that_maps_its_memory_as_qemu_does_not_is_refused():
    small, large = memory.empty_memory(SIZE // 2), memory.empty_memory(SIZE)
    with holder(large, "private") as process:
        with pytest.raises(NodeError, match="as QEMU does"):
            memory.copy_memory(process.pid, small)
        process.stdin.close()
    os.close(small)
    os.close(large)


def test_nobody_writes_the_memory_of_a_template(tmp_path):
    (tmp_path / "base").write_bytes(content({1: 9}))
    base = memory.load_memory(tmp_path / "base")
    with open(f"/proc/self/fd/{base}", "r+b", buffering=0) as file:  # noqa: PTH123 - a link of its own kind
        with pytest.raises(PermissionError):
            file.write(b"x")
        with pytest.raises(PermissionError):
            mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_SHARED)
        mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE)[0:1] = b"x"
    assert os.pread(base, SIZE, 0) == content({1: 9})
    os.close(base)


@needs_root
def test_a_process_without_such_memory_is_refused(tmp_path):
    base = memory.empty_memory(SIZE)
    with pytest.raises(NodeError, match="as QEMU does"):
        memory.copy_memory(os.getppid(), base)
    os.close(base)


def test_what_is_zero_is_not_stored(tmp_path):
    source = os.memfd_create("source")
    os.pwrite(source, bytes(8 << 20), 0)
    places = {0: b"first", 5000: b"x", (3 << 20) - 2: b"across", (8 << 20) - 3: b"end"}
    for at, data in places.items():
        os.pwrite(source, data, at)
    with (tmp_path / "file").open("x+b") as file:
        copy_not_zero(source, file.fileno())
        assert os.pread(file.fileno(), 9 << 20, 0) == os.pread(source, 9 << 20, 0)
        assert file.seek(0, os.SEEK_END) == 8 << 20
        assert os.fstat(file.fileno()).st_blocks * 512 < 128 << 10
    os.close(source)


def test_the_copy_of_a_disk_has_its_holes(tmp_path):
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(1 << 30)
        os.pwrite(file.fileno(), b"begin", 0)
        os.pwrite(file.fileno(), b"middle" * 1000, 500 << 20)
    with (tmp_path / "disk").open("rb") as disk:
        copy_file(disk.fileno(), tmp_path / "copy")
    status = (tmp_path / "copy").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    with (tmp_path / "copy").open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek(500 << 20)
        assert file.read(6000) == b"middle" * 1000


def make_machine(box, disks):
    """The folder of a box with a machine that stands on some disks."""
    (box / "vm").mkdir(parents=True)
    (box / "disks").mkdir()
    for name in ("devices", "disk"):
        (box / "vm" / name).write_bytes(name.encode() * 1000)
    for number in range(disks):
        (box / "disks" / str(number)).write_bytes(b"%d" % number * 4096)
    return box


def test_what_a_machine_stands_on_is_shared_and_its_own_is_copied(tmp_path):
    box = make_machine(tmp_path / "box", 2)
    save_machine(box, tmp_path / "saved")
    disks = tmp_path / "saved/disks"
    assert [(disks / str(n)).read_bytes()[:1] for n in range(3)] == [b"0", b"1", b"d"]
    assert [(disks / str(n)).stat().st_nlink for n in range(3)] == [2, 2, 1]
    assert (tmp_path / "saved/devices").read_bytes() == b"devices" * 1000
    for number in range(2, 65):
        (box / "disks" / str(number)).touch()
    with pytest.raises(UnsupportedError, match="stands on 65 others"):
        save_machine(box, tmp_path / "again")


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
def test_an_overlay_is_an_empty_disk_of_the_size_of_the_lowest_below(tmp_path):
    (tmp_path / "disks").mkdir()
    with (tmp_path / "disks/0").open("wb") as file:
        file.truncate(5 << 20)
    overlays = Overlays()
    for name in ("a", "b"):
        overlays.make(tmp_path / "disks", tmp_path / name)
        call = ["qemu-img", "info", "--output=json", tmp_path / name]
        said = json.loads(subprocess.run(call, capture_output=True, check=True).stdout)
        assert said["format"] == "qcow2"
        assert said["virtual-size"] == 5 << 20
        subprocess.run(["qemu-img", "check", tmp_path / name], check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "disks"]


def test_without_qemu_img_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "disks").mkdir()
    (tmp_path / "disks/0").write_bytes(b"x" * 4096)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnsupportedError, match="qemu-img") as caught:
        Overlays().make(tmp_path / "disks", tmp_path / "a")
    assert "qemu-utils" in caught.value.hint


@pytest.fixture
def template(tmp_path):
    """A template, and the folder of its parts."""
    base = memory.empty_memory(SIZE)
    with holder(base, "shared", 5) as process:
        box = make_machine(tmp_path / "box", 0)
        Templates(tmp_path / "t").make("key", box, lambda: memory.copy_memory(process.pid, base))
        process.stdin.close()
    os.close(base)
    return tmp_path / "t/key"


@needs_root
def test_a_template_is_found_by_another_daemon(template, tmp_path):
    found = Templates(template.parent).find("key")
    assert os.pread(found.memory, SIZE, 0) == content({5: 6})
    assert found.devices.read_bytes() == b"devices" * 1000
    assert link_disks(found.disks, tmp_path / "disks") == 1
    assert (tmp_path / "disks/0").read_bytes() == b"disk" * 1000
    assert Templates(template.parent).find("other") is None


@needs_root
@pytest.mark.parametrize("name", ["memory", "devices", "disks/0", "whole.json"])
@pytest.mark.parametrize("how", ["flipped", "cut off", "gone"])
def test_a_damaged_template_is_none(template, name, how):
    path = template / name
    data = path.read_bytes()
    middle = len(data) // 3
    if how == "gone":
        path.unlink()
    else:
        path.chmod(0o600)
        new = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(data[:-1] if how == "cut off" else new)
    assert Templates(template.parent).find("key") is None

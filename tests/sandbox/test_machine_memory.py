"""The memory of machines, and templates: what is written is what was there, and damage is seen."""

import mmap
import os
import subprocess
import sys

import pytest

from hadal.errors import NodeError
from hadal.node.machines import memory
from hadal.node.machines.templates import Templates, copy_disk
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
        memory.dump_memory(process.pid, base, tmp_path / "dump")
        process.stdin.close()
    assert (tmp_path / "dump").read_bytes() == content(pages | {0: 1, 1: 2, 40: 41, 63: 64})
    os.close(base)


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
    with pytest.raises(NodeError, match="no memory"):
        memory.dump_memory(os.getppid(), base, tmp_path / "dump")
    os.close(base)


def test_the_copy_of_a_disk_has_its_holes(tmp_path):
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(1 << 30)
        os.pwrite(file.fileno(), b"begin", 0)
        os.pwrite(file.fileno(), b"middle" * 1000, 500 << 20)
    copy_disk(tmp_path / "disk", tmp_path / "copy")
    status = (tmp_path / "copy").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    with (tmp_path / "copy").open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek(500 << 20)
        assert file.read(6000) == b"middle" * 1000


@pytest.fixture
def template(tmp_path):
    """A template, and the folder of its parts."""
    machine = tmp_path / "machine"
    machine.mkdir()
    for name in ("devices", "disk"):
        (machine / name).write_bytes(name.encode() * 1000)
    base = memory.empty_memory(SIZE)
    with holder(base, "shared", 5) as process:
        Templates(tmp_path / "t").make("key", process.pid, base, machine)
        process.stdin.close()
    os.close(base)
    return tmp_path / "t/key"


@needs_root
def test_a_template_is_found_by_another_daemon(template):
    found = Templates(template.parent).find("key")
    assert os.pread(found.memory, SIZE, 0) == content({5: 6})
    assert (found.folder / "devices").read_bytes() == b"devices" * 1000
    assert Templates(template.parent).find("other") is None


@needs_root
@pytest.mark.parametrize("name", ["memory", "devices", "disk", "whole.json"])
@pytest.mark.parametrize("how", ["flipped", "cut off", "gone"])
def test_a_damaged_template_is_none(template, name, how):
    path = template / name
    data = path.read_bytes()
    middle = len(data) // 3
    if how == "gone":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert Templates(template.parent).find("key") is None

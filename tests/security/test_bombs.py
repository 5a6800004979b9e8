"""Everything that can be used up: the box meets its limit, its neighbours work on, and it goes away."""

import contextlib
import io
import os
import re
import tarfile
import time
from pathlib import Path

import pytest

from hadal.errors import HadalError, NodeError, SandboxFileError, UnsafeFileError
from tests.sandbox.conftest import needs_root

pytestmark = needs_root
MEMORY_MB = 128


def host_free_mb():
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) >> 10


def tcp_mb():
    text = Path("/proc/net/sockstat").read_text()
    return int(re.search(r"TCP: .* mem (\d+)", text)[1]) * 4 >> 10


PROGRAMS = {
    "anonymous": "killed", "memfd": "killed", "pipes": None, "unix": None, "tcp": None, "threads": "EAGAIN",
    "zombies": "EAGAIN", "descriptors": "EMFILE", "polls": None, "/dev/shm/f": "ENOSPC", "/tmp/f": "ENOSPC",
    "inodes": "ENOSPC",
}  # fmt: skip
"""Each kind, and how it ends: by a kill for memory, an error, or one of several."""
QUICK = {"anonymous", "tcp", "threads", "descriptors", "/dev/shm/f"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in PROGRAMS]
)
def test_a_bomb_meets_its_limit(make, compiled, neighbour, remove, kind):
    box = make(memory_mb=MEMORY_MB, pids=64, inodes=20_000, disk_mb=64)
    box.files.upload(compiled("bombs"), "/tmp/bombs")
    before, tcp_before = host_free_mb(), tcp_mb()
    with neighbour():
        process = box.spawn(["/tmp/bombs", kind, "2"], timeout_s=30)
        lowest, tcp_most, end = before, tcp_before, time.monotonic() + 2
        while time.monotonic() < end:
            lowest, tcp_most = min(lowest, host_free_mb()), max(tcp_most, tcp_mb())
            time.sleep(0.05)
        assert box.usage().memory_bytes <= MEMORY_MB << 20
        result = process.wait()
    if PROGRAMS[kind] == "killed":
        assert result.oom_killed, result
    elif PROGRAMS[kind] is not None:
        assert f"error={PROGRAMS[kind]}\n" in result.stdout, result
    assert not result.timed_out, result
    # Others use this machine, too: what counts is that nothing comes near what a bomb without a limit takes.
    assert before - lowest < 1500, f"the host lost {before - lowest} MiB"
    assert tcp_most - tcp_before < MEMORY_MB, f"{tcp_most - tcp_before} MiB of TCP buffers"
    remove(box)


SHELL = {
    "forks": "f() { f | f & }; f; sleep 2",
    "ignored signals": "trap '' TERM INT HUP QUIT; while :; do sleep 1; done",
    "everything stopped": "sleep 100 & sleep 100 & kill -STOP -1; kill -STOP $$",
    "output on both streams": "yes & yes >&2",
    "a line without an end": "tr '\\0' x < /dev/zero",
    "one byte at a time": "while :; do printf x; printf y >&2; done",
    "sessions": "while :; do setsid sleep 100 & done",
}
QUICK_SHELL = {"forks", "everything stopped", "output on both streams"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_SHELL else [pytest.mark.slow]) for n in SHELL]
)
def test_a_command_that_does_not_want_to_end(make, neighbour, remove, node, name):
    box = make(memory_mb=MEMORY_MB, pids=64)
    with neighbour():
        began = time.monotonic()
        result = box.run(SHELL[name], timeout_s=2, output_limit=100_000)
        assert time.monotonic() - began < 5
    assert len(result.stdout_bytes) <= 100_000 + 16384
    assert len(result.stderr_bytes) <= 100_000 + 16384
    spooled = sum(p.stat().st_size for p in (node / "b" / box.id).glob("out-*"))
    assert spooled < 1 << 20
    remove(box)


@pytest.mark.slow
def test_a_terminal_that_is_flooded(make, neighbour, remove):
    box = make()
    with neighbour():
        result = box.spawn("yes 0123456789", tty=(24, 80), timeout_s=3, output_limit=100_000).wait()
    assert result.timed_out
    remove(box)


def test_terminals_are_limited(make, remove):
    box = make(memory_mb=256)
    script = "import os\nn = 0\ntry:\n  while n < 5000: os.openpty(); n += 1\nexcept OSError as e: print(n, e.errno)"
    result = box.run(["python3", "-c", script])
    assert int(result.stdout.split()[0]) < 2100, result
    remove(box)


@pytest.mark.slow
def test_a_million_events_of_the_kernel(make, attack, neighbour, remove):
    box = make(memory_mb=MEMORY_MB)
    with neighbour():
        attack(box, "exhaustion", "hold")
    remove(box)


def test_a_directory_that_is_deep(make, attack, neighbour, remove, tmp_path):
    """Thousands of levels: beyond any stack, any path and any number of open files."""
    box = make(memory_mb=512, cpus=1, inodes=5_000)
    with neighbour():
        assert int(attack(box, "bombs", "deep")["count"]) > 4_000
        assert len(box.files.list("/tmp/deep", depth=3)) == 3
        for operation in (
            lambda: box.files.list("/tmp/deep", depth=1_000_000),
            lambda: box.files.download("/tmp/deep", tmp_path / "deep"),
        ):
            with pytest.raises(HadalError):
                operation()
        with pytest.raises(NodeError, match="nested too deep") as refused:
            box.fork(1)
        assert "remove them" in refused.value.hint
        began = time.monotonic()
        box.files.remove("/tmp/deep", recursive=True)
        assert time.monotonic() - began < 20
    assert not box.files.exists("/tmp/deep")
    attack(box, "bombs", "deep")
    remove(box)


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_thousand_levels_are_removed(make, attack, neighbour, remove):
    """In a time that grows with their number, and in the box's memory: theirs is nearly all of it."""
    box = make(memory_mb=384, cpus=1, inodes=110_000, disk_mb=1000)
    assert int(attack(box, "bombs", "deep")["count"]) == 100_000
    with neighbour():
        began = time.monotonic()
        box.files.remove("/tmp/deep", recursive=True)
        assert time.monotonic() - began < 120
    assert not box.files.exists("/tmp/deep")
    assert box.usage().oom_kills == 0
    remove(box)


@pytest.mark.slow
@pytest.mark.long
def test_a_million_names(make, attack, neighbour, remove):
    box = make(memory_mb=1024, cpus=1, inodes=1_010_000, disk_mb=4000)
    with neighbour():
        found = attack(box, "bombs", "inodes", timeout_s=120)
        assert int(found["count"]) > 990_000
        with pytest.raises(SandboxFileError):
            box.files.list("/tmp", depth=2)
    remove(box)


def test_a_file_of_exabytes_is_not_kept_by_the_node(make, node, neighbour, remove):
    box = make()
    box.run("truncate -s 10T /tmp/huge")
    with neighbour():
        for path in ("/tmp/huge", "/dev/zero"):
            taken = 0
            for chunk in box.files.read_chunks(path):
                taken += len(chunk)
                if taken > 64 << 20:
                    break
            assert sum(p.stat().st_size for p in (node / "b" / box.id).glob("applet-*")) == 0
    assert box.run("echo on").stdout == "on\n"
    remove(box)


def entry(name, size=0, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


ARCHIVES = {
    "a size that is a lie": entry("f", size=1 << 50) + b"x" * 1000,
    "a path that leads up": entry("../../../tmp/up"),
    "a path from the root": entry("/tmp/root"),
    "a link and a file behind it": entry("l", kind=tarfile.SYMTYPE, link="/etc") + entry("l/passwd") + bytes(1024),
    "a hard link that leads out": entry("h", kind=tarfile.LNKTYPE, link="../../etc/passwd") + bytes(1024),
    "a device": entry("d", kind=tarfile.CHRTYPE) + bytes(1024),
    "a sparse file": entry("s", kind=tarfile.GNUTYPE_SPARSE, size=1 << 40) + bytes(1024),
    "names without an end": entry("x", size=1 << 40, kind=tarfile.GNUTYPE_LONGNAME) + b"x" * 100_000,
    "noise": os.urandom(100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_lies(make, node, name):
    """Unpacked in the box, beneath one directory; what is wrong is an error and nothing else."""
    from hadal.sandbox.portal import call

    box = make()
    box.files.mkdir("/tmp/in")
    before = box.run("sha256sum /etc/passwd").stdout
    query = {"path": "/tmp/in", "how": "unpack"}
    with contextlib.suppress(SandboxFileError):
        call(box.files.wrapped._put(query, ARCHIVES[name]))
    assert box.run("sha256sum /etc/passwd").stdout == before
    assert box.run("ls /tmp").stdout == "in\n"
    assert box.run("find /tmp/in -type c -o -type b").stdout == ""


@pytest.mark.slow
def test_an_archive_of_a_million_entries(make, neighbour, remove):
    from hadal.sandbox.portal import call

    packed = io.BytesIO()
    for i in range(1_000_000):
        packed.write(entry(f"d{i % 1000}/{i}"))
    box = make(inodes=50_000, disk_mb=500)
    with neighbour(), pytest.raises(SandboxFileError, match="No space"):
        call(box.files.wrapped._put({"path": "/tmp", "how": "unpack"}, packed.getvalue()))
    remove(box)


def test_a_download_stays_in_its_directory(make, tmp_path):
    """Links that lead out of it are refused."""
    box, target = make(), tmp_path / "target"
    (tmp_path / "outside").mkdir()
    for link in ("/etc", "../../outside", "x/../../../outside"):
        box.run(["rm", "-rf", "/tmp/u"])
        box.run(f"mkdir -p /tmp/u; ln -s {link} /tmp/u/l")
        with pytest.raises(UnsafeFileError):
            box.files.download("/tmp/u", target)
    assert list((tmp_path / "outside").iterdir()) == []

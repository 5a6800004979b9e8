"""Files, from outside: any content, any name, and errors of the system."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path

from hadal.errors import SandboxFileError
from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, expect, holds

__all__ = [
    "a_fifo_holds_up_nobody",
    "attributes_and_changes",
    "beyond_four_gigabytes",
    "errors",
    "larger_than_memory",
    "odd_names",
    "sizes",
    "trees",
]

_ODD_NAMES = (
    "a b", "new\nline", "-rf", "ünï", "*?[x]", "'\"\\$(x)", "x" * 255, os.fsdecode(b"\xff\xfe\x80"),
    "..x", "tab\t", "%41&=?#+",
)  # fmt: skip


@check()
def sizes(make: MakeBox) -> None:
    """Files of 0 bytes to some megabytes come back as they were written."""
    with make() as box:
        for size in (0, 1, 4095, 65_536, 262_145, 3_000_001):
            data = os.urandom(size)
            box.files.write("/tmp/f", data)
            holds(box.files.read("/tmp/f") == data, f"{size} bytes differ")
            equal(box.files.stat("/tmp/f").size, size)
        data = bytes(range(256)) * 10
        box.files.write("/tmp/f", data)
        equal(box.files.read("/tmp/f", offset=100, length=50), data[100:150])
        equal(box.files.read("/tmp/f", offset=10_000), b"")


@check(Capability.DISK, slow=True)
def larger_than_memory(make: MakeBox) -> None:
    """A file of twice the box's memory goes in and out: nothing in the box holds it."""
    size, block, whole = 256 << 20, os.urandom(1 << 20), hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, make(disk_mb=600, memory_mb=128) as box:
        path = Path(folder, "large")
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
                whole.update(block)
        box.files.write("/home/large", path)
        there = box.run("sha256sum < /home/large", timeout_s=300).stdout.split()[0]
        equal(there, whole.hexdigest())
        box.files.download("/home/large", path)
        equal(path.stat().st_size, size)
        with path.open("rb") as file:
            equal(hashlib.file_digest(file, "sha256").hexdigest(), whole.hexdigest())


@check()
def beyond_four_gigabytes(make: MakeBox) -> None:
    """Sizes and offsets have more than 32 bits."""
    with make() as box:
        end = 5 << 30
        equal(box.run(f"printf end | dd of=/tmp/sparse bs=1 seek={end}").exit_code, 0)
        equal(box.files.stat("/tmp/sparse").size, end + 3)
        equal(box.files.read("/tmp/sparse", offset=end - 1), b"\0end")


@check()
def odd_names(make: MakeBox) -> None:
    """Every name that the system allows works everywhere."""
    with make() as box:
        box.files.mkdir("/tmp/odd")
        for name in _ODD_NAMES:
            box.files.write(f"/tmp/odd/{name}", os.fsencode(name))
            equal(box.files.read(f"/tmp/odd/{name}"), os.fsencode(name), name)
        found = {f.path for f in box.files.list("/tmp/odd")}
        equal(found, set(_ODD_NAMES))
        for name in _ODD_NAMES:
            box.files.rename(f"/tmp/odd/{name}", "/tmp/odd/plain")
            box.files.remove("/tmp/odd/plain")
        equal(box.files.list("/tmp/odd"), [])


@check()
def attributes_and_changes(make: MakeBox) -> None:
    """Kinds, modes, owners and links are told, and can be changed."""
    with make() as box:
        box.files.write("/tmp/a/b/f", "x", parents=True, mode=0o751, user="0")
        found = box.files.stat("/tmp/a/b/f")
        equal((found.kind, found.mode, found.uid, found.size), ("file", 0o751, 0, 1))
        box.files.write("/tmp/a/b/f", "more", append=True)
        equal(box.files.read_text("/tmp/a/b/f"), "xmore")
        equal(box.files.stat("/tmp/a/b/f").mode, 0o751, "an append keeps the mode")
        box.files.chmod("/tmp/a/b/f", 0o600)
        box.files.chown("/tmp/a/b/f", "12:34")
        equal((box.files.stat("/tmp/a/b/f").mode, box.files.stat("/tmp/a/b/f").gid), (0o600, 34))
        box.files.symlink("/tmp/a/l", "b/f")
        link = box.files.stat("/tmp/a/l", follow=False)
        equal((link.kind, link.target, box.files.stat("/tmp/a/l").kind), ("symlink", "b/f", "file"))
        box.run("mkfifo /tmp/a/p")
        equal([(f.path, f.kind) for f in box.files.list("/tmp/a", depth=2)],
              [("b", "directory"), ("b/f", "file"), ("l", "symlink"), ("p", "fifo")])  # fmt: skip
        box.files.mkdir("/tmp/a/c/d", parents=True)
        box.files.mkdir("/tmp/a/c/d", parents=True)
        box.files.remove("/tmp/a", recursive=True)
        equal(box.files.exists("/tmp/a"), False)


@check()
def errors(make: MakeBox) -> None:
    """Errors are those of the system, with the path."""
    with make() as box:
        box.files.write("/tmp/f", "x")
        box.files.mkdir("/tmp/d")
        box.files.write("/tmp/d/x", "x")
        cases = (
            (lambda: box.files.read("/tmp/none"), errno.ENOENT),
            (lambda: box.files.read("/tmp/d"), errno.EISDIR),
            (lambda: box.files.list("/tmp/f"), errno.ENOTDIR),
            (lambda: box.files.write("/no/such/f", "x"), errno.ENOENT),
            (lambda: box.files.write("/tmp/f", "x", create=True), errno.EEXIST),
            (lambda: box.files.remove("/tmp/d"), errno.ENOTEMPTY),
            (lambda: box.files.mkdir("/tmp/d"), errno.EEXIST),
            (lambda: box.files.rename("/tmp/none", "/tmp/g"), errno.ENOENT),
            (lambda: box.files.read("/etc/shadow-", user="1234:1234"), None),
        )
        for operation, number in cases:
            with expect(SandboxFileError) as caught:
                operation()
            if number is not None:
                equal(caught.error.errno, number, str(caught.error))
        with expect(OSError):
            box.files.stat("/tmp/none")


@check()
def trees(make: MakeBox) -> None:
    """Directories go in and out whole, with modes and links."""
    with make() as box, tempfile.TemporaryDirectory() as folder:
        source, back = Path(folder, "source"), Path(folder, "back")
        (source / "deep/er").mkdir(parents=True)
        (source / "deep/er/f").write_bytes(b"content")
        (source / "run").write_text("#!/bin/sh\necho ran\n")
        (source / "run").chmod(0o755)
        (source / "link").symlink_to("deep/er/f")
        for i in range(200):
            (source / f"n{i}").write_text(str(i))
        box.files.upload(source, "/tmp/tree")
        equal(box.run("/tmp/tree/run; cat /tmp/tree/link; ls /tmp/tree | wc -l").stdout,
              "ran\ncontent203\n")  # fmt: skip
        box.files.download("/tmp/tree", back)
        same = {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        equal({p.relative_to(back): p.read_bytes() for p in back.rglob("*") if p.is_file()}, same)
        equal((back / "link").readlink(), Path("deep/er/f"))
        equal((back / "run").stat().st_mode & 0o777, 0o755)


@check()
def a_fifo_holds_up_nobody(make: MakeBox) -> None:
    """Reading a FIFO without a writer waits alone; the box answers others."""
    with make() as box:
        box.run("mkfifo /tmp/p; (sleep 0.5; echo late > /tmp/p) > /dev/null 2>&1 &")
        equal(box.files.read("/tmp/p"), b"late\n")

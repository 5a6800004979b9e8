"""Archives out of boxes: good ones come out as they were, hostile ones touch nothing outside."""

import contextlib
import io
import os
import random
import tarfile

import pytest

from hadal.errors import UnsafeFileError
from hadal.sandbox.extraction import extract

TYPES = {
    "file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE, "odd": b"Z",
    "pax": tarfile.XHDTYPE, "global": tarfile.XGLTYPE, "sparse": tarfile.GNUTYPE_SPARSE,
}  # fmt: skip


def pack(*entries):
    made = io.BytesIO()
    for kind, name, value, *mode in entries:
        info = tarfile.TarInfo(name)
        info.type, info.mtime, info.mode = TYPES[kind], 1_000_000_000, (mode or [0o644])[0]
        data = value.encode() if kind == "file" else b""
        info.size, info.linkname = len(data), value if kind in ("link", "hard") else ""
        made.write(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
        made.write(data + bytes(-len(data) % 512))
    return made.getvalue() + bytes(1024)


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    yield folder
    assert {p.name for p in tmp_path.iterdir()} == {"target", "outside"}
    assert {p.name: p.read_text() for p in (tmp_path / "outside").iterdir()} == {"secret": "secret"}
    assert (tmp_path / "outside/secret").stat().st_nlink == 1


def take(target, *entries):
    extract(io.BytesIO(pack(*entries)), target)


def test_files_directories_and_links(target):
    (target / "d").mkdir()
    (target / "d/f").write_text("old")
    (target / "l").symlink_to("/nowhere")
    take(
        target,
        ("dir", "./", ""),
        ("dir", "./d", "", 0o2777),
        ("file", "./d/f", "content", 0o6775),
        ("file", "./" + "n" * 200, "long"),
        ("link", "./d/l", "../d/./f"),
        ("link", "./l", "d"),
        ("link", "./long", "x/" * 150 + "y"),
        ("hard", "./d/h", "./d/f"),
        ("file", "./new/deep/g", "", 0o077),
        ("file", "./\udcff", "bytes"),
    )
    assert (target / "d/f").read_text() == (target / "d/l").read_text() == "content"
    assert (target / "d/f").stat().st_mode == 0o100755
    assert (target / "d/f").stat().st_mtime == (target / "d").stat().st_mtime == 1_000_000_000
    assert (target / "d/l").lstat().st_mtime == target.stat().st_mtime == 1_000_000_000
    assert (target / "d/h").stat().st_ino == (target / "d/f").stat().st_ino
    assert (target / ("n" * 200)).read_text() == "long"
    assert (target / "l").readlink().name == "d"
    assert str((target / "long").readlink()) == "x/" * 150 + "y"
    assert (target / "new/deep/g").stat().st_mode & 0o777 == 0o644
    assert (target / os.fsdecode(b"\xff")).read_text() == "bytes"


HOSTILE = {
    "an absolute name": [("file", "/outside/f", "x")],
    "a name that goes up": [("file", "../outside/f", "x")],
    "a name that goes down and up": [("file", "a/../../outside/f", "x")],
    "a directory above": [("dir", "..", "")],
    "an absolute link": [("link", "l", "/etc")],
    "a link that goes up": [("link", "l", "../outside")],
    "a link that goes down and up": [("dir", "x", ""), ("link", "l", "x/../../outside")],
    "a deep link that goes up": [("link", "a/b/l", "../../../outside")],
    "a link to nothing": [("link", "l", "")],
    "a file behind a link": [("dir", "d", ""), ("link", "l", "d"), ("file", "l/f", "x")],
    "a directory behind a link": [("dir", "d", ""), ("link", "l", "d"), ("dir", "l", "")],
    "links that add up": [("dir", "a/b", ""), ("link", "c", "a/b"), ("link", "d", "c/../../../outside")],
    "a hard link that goes up": [("hard", "h", "../outside/secret")],
    "an absolute hard link": [("hard", "h", "/etc/passwd")],
    "a hard link to a link": [("link", "a/b/l", "../.."), ("hard", "h", "a/b/l")],
    "a hard link behind a link": [("dir", "d", ""), ("file", "d/f", ""), ("link", "l", "d"), ("hard", "h", "l/f")],
    "a hard link to nothing": [("hard", "h", "nothing")],
    "a hard link to a directory": [("dir", "d", ""), ("hard", "h", "d")],
    "a character device": [("char", "c", "")],
    "a block device": [("block", "b", "")],
    "a FIFO": [("fifo", "p", "")],
    "an odd kind": [("odd", "o", "")],
    "pax headers": [("pax", "o", "")],
    "global headers": [("global", "o", "")],
    "a sparse file": [("sparse", "o", "")],
    "a file without a name": [("file", "./", "x")],
    "a name without an end": [("file", "a/" * 4000 + "f", "x")],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_leads_out_or_is_no_file_is_refused(target, name):
    with pytest.raises(UnsafeFileError):
        take(target, *HOSTILE[name])


def test_a_chain_of_links_longer_than_paths(target):
    """CVE-2025-4517: a path that is too long to be resolved was taken to stay inside."""
    component, entries, path = "d" * 247, [], ""
    for letter in "abcdefghijklmnop":
        entries += [("dir", f"{path}{component}", ""), ("link", f"{path}{letter}", component)]
        path += f"{component}/"
    chain = "/".join("abcdefghijklmnop")
    entries = [e for e in entries if len(e[1]) < 4000]
    up = [("link", "up", f"{chain}/{'l' * 254}/{'../' * 16}")]
    escape = [("link", "escape", "up/../outside"), ("file", "escape/secret", "overwritten")]
    with pytest.raises(UnsafeFileError):
        take(target, *entries, *up, *escape)
    with pytest.raises(UnsafeFileError):
        take(target, *entries, ("file", f"{chain}/f", "x"))
    with pytest.raises(UnsafeFileError):
        take(target, *entries, ("hard", "h", f"{chain}/../../outside/secret"))


def test_links_of_the_target_are_not_followed_either(target):
    (target / "out").symlink_to("../outside")
    (target / "file").symlink_to("../outside/secret")
    with pytest.raises(UnsafeFileError):
        take(target, ("file", "out/secret", "overwritten"))
    take(target, ("file", "file", "beside it"))
    assert not (target / "file").is_symlink()


def test_no_damage_is_anything_but_a_named_error(target):
    rng = random.Random(5)
    good = pack(("dir", "d", ""), ("file", "d/f", "content" * 200), ("link", "d/" + "l" * 150, "f"),
                ("hard", "h", "d/f"))  # fmt: skip
    for length in (1, 511, 700, 1100, 1600):
        with pytest.raises(UnsafeFileError, match=r"cut off|damaged"):
            extract(io.BytesIO(good[:length]), target)
    for _ in range(300):
        data = bytearray(good)
        at = rng.randrange(0, len(data), 512)
        for _ in range(rng.randrange(1, 4)):
            data[min(at + rng.randrange(160), len(data) - 1)] = rng.randrange(256)
        header = bytearray(data[at : at + 512])  # with a checksum that is right
        header[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        with contextlib.suppress(UnsafeFileError, OSError):
            extract(io.BytesIO(bytes(data)), target)


def test_numbers_beyond_octal(target):
    info = tarfile.TarInfo("f")
    for field, value in (("mtime", 1 << 60), ("mtime", -5), ("size", 1 << 62)):
        setattr(info, field, value)
        try:
            extract(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), target)
        except UnsafeFileError:
            assert field == "size"

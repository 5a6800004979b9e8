"""What a machine says that it has changed is not trusted: it is read as it is written by our guest, or refused."""

import hashlib
import tarfile

import pytest

from hadal.errors import NodeError, SandboxFileError
from hadal.node.machines.changes import list_layer


def archive(path, *entries, end=b"\0" * 1024):
    """An archive of entries: name, content or type and target, and what is different of it."""
    with path.open("wb") as file:
        for name, content, changes in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            info.pax_headers = {"ctime": "12.000000034"} | changes.pop("pax", {})
            for key, value in changes.items():
                setattr(info, key, value)
            info.size = changes.get("size", len(content))
            file.write(info.tobuf(tarfile.PAX_FORMAT))
            file.write(content + bytes(-len(content) % 512))
        file.write(end)
    return path


def listed(path, **settings):
    return {c.path: c for c in list_layer(path, **{"most": 100} | settings)}


def test_entries_become_changes(tmp_path):
    found = listed(
        archive(
            tmp_path / "a",
            ("./", b"", {"type": tarfile.DIRTYPE}),
            ("./d", b"", {"type": tarfile.DIRTYPE, "mode": 0o700}),
            ("./d/.wh..wh..opq", b"", {}),
            ("./d/f", b"content", {}),
            ("./d/.wh.gone", b"", {}),
            ("./other", b"", {"type": tarfile.LNKTYPE, "linkname": "./d/f"}),
            ("./link", b"", {"type": tarfile.SYMTYPE, "linkname": "f"}),
            ("./fifo", b"", {"type": tarfile.FIFOTYPE}),
        )
    )
    assert sorted(found) == ["/d", "/d/f", "/d/gone", "/fifo", "/link", "/other"]
    digest = hashlib.sha256(b"content").hexdigest()
    assert (found["/d"].kind, found["/d"].directory, found["/d"].mode) == ("replaced", True, 0o700)
    assert (found["/d/gone"].kind, found["/d/gone"].digest) == ("removed", None)
    assert {(found[p].digest, found[p].size) for p in ("/d/f", "/other")} == {(digest, 7)}
    assert found["/link"].digest == hashlib.sha256(b"f").hexdigest()
    assert found["/fifo"].digest is None
    assert found["/d/f"].changed_ns == 12_000_000_034


def test_content_is_not_read_where_it_is_not_wanted(tmp_path):
    path = archive(tmp_path / "a", ("./a", b"x" * 5000, {}), ("./b", b"y", {}))
    assert {c.path: c.digest for c in list_layer(path, most=9, content=False)} == {
        "/a": None,
        "/b": None,
    }
    with pytest.raises(SandboxFileError, match="more than 1 paths"):
        listed(path, limit=1)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([("./a", b"", {"pax": {"ctime": "yesterday"}})], "without its time"),
        ([("./a", b"", {"type": tarfile.LNKTYPE, "linkname": "./b"})], "not there"),
        ([("./a", b"abc", {"size": 9000})], "cut off"),
        ([(f"./{n}", b"", {}) for n in range(101)], "more than the 100 files"),
        ([("./a", b"", {"pax": {"comment": "x" * (1 << 20)}})], "a header of"),
    ],
)
def test_what_our_guest_does_not_write_is_refused(tmp_path, entries, text):
    with pytest.raises(NodeError, match=text):
        listed(archive(tmp_path / "a", *entries))


def test_an_archive_is_whole(tmp_path):
    path = archive(tmp_path / "a", ("./a", b"content", {}), end=b"")
    with pytest.raises(NodeError, match="cut off"):
        listed(path)
    data = path.read_bytes()
    for place, text in ((124, "no number"), (512, "pax header")):
        path.write_bytes(data[:place] + b"zz" + data[place + 2 :])
        with pytest.raises(NodeError, match=text):
            listed(path)


def test_a_header_of_many_records_is_read_in_time(tmp_path):
    """Each record is looked at once: no part of the header is copied again for it."""
    data = b"8 a=bcd\n" * 100_000 + b"no record\n"
    info = tarfile.TarInfo("pax")
    info.type = b"x"
    info.size = len(data)
    path = tmp_path / "a"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    with pytest.raises(NodeError, match="pax header"):
        listed(path)

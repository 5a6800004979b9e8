"""What a box has changed, as the node reads it: digests of files with holes, and trees that are no good."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from hadal.errors import SandboxFileError
from hadal.node import changes
from hadal.node.changes import list_changes
from hadal.node.tree_removal import remove_tree
from tests.sandbox.conftest import names


def digest(folder, name):
    return {c.path: c.digest for c in list_changes(folder)}[f"/{name}"]


def write(path, size, *parts):
    with path.open("wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
        file.truncate(size)


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, (3 << 20) + 17])
def test_a_digest_is_that_of_the_content_holes_or_not(tmp_path, size):
    write(tmp_path / "f", size, *((at, b"some") for at in (0, 9000, 1 << 20) if at + 4 <= size))
    assert digest(tmp_path, "f") == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


def test_terabytes_of_holes_take_no_time(tmp_path):
    for number in range(20):
        write(tmp_path / f"f{number}", 1 << 40, (5 << 30, b"x"))
    write(tmp_path / "other", 1 << 40, (5 << 30, b"y"))
    write(tmp_path / "longer", (1 << 40) + 1, (5 << 30, b"x"))
    write(tmp_path / "later", 1 << 40, (6 << 30, b"x"))
    began = time.monotonic()
    found = {c.path: c for c in list_changes(tmp_path)}
    assert time.monotonic() - began < 2
    assert found["/f0"].size == 1 << 40
    assert found["/f0"].digest.startswith("sparse:")
    unlike = ("/f0", "/other", "/longer", "/later")
    assert len({found[name].digest for name in unlike}) == 4
    assert {found[f"/f{n}"].digest for n in range(20)} == {found["/f0"].digest}


def test_a_sparse_digest_does_not_depend_on_what_is_a_hole(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_ZEROS_MAX", 1 << 20)
    size = (5 << 20) + 3
    write(tmp_path / "holes", size, (3 << 20, b"x"), (size - 1, b"z"))
    write(tmp_path / "fewer", size, (0, bytes(2_500_001)), (3 << 20, b"x"), (size - 1, b"z"))
    assert digest(tmp_path, "holes") == digest(tmp_path, "fewer")
    assert digest(tmp_path, "holes").startswith("sparse:")


def test_many_files_of_holes_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_ZEROS_MAX", 10 << 20)
    for name in "abcde":
        write(tmp_path / name, 4 << 20)
    kinds = [c.digest.startswith("sparse:") for c in list_changes(tmp_path)]
    assert kinds == [False, False, True, True, True]


def test_what_changes_meanwhile_is_left_out_and_never_followed(tmp_path, monkeypatch):
    """Between looking at a name and opening it, the box makes something else of it."""
    upper, outside = tmp_path / "upper", tmp_path / "outside"
    upper.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (upper / "d").mkdir()
    for name in ("f", "gone", "pipe", "plain"):
        (upper / name).write_text("content")
    stat = os.stat

    def swap(name, **options):
        found = stat(name, **options)
        if name == "d":
            (upper / "d").rmdir()
            (upper / "d").symlink_to(outside)
        elif name in ("f", "gone", "pipe"):
            (upper / name).unlink()
            if name == "f":
                (upper / "f").symlink_to(outside / "secret")
            elif name == "pipe":
                os.mkfifo(upper / "pipe")
        return found

    monkeypatch.setattr(os, "stat", swap)
    assert {c.path: c.digest for c in list_changes(upper)} == {
        "/pipe": None,
        "/plain": hashlib.sha256(b"content").hexdigest(),
    }


def test_a_tree_that_is_too_deep_has_a_name(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    before = len(names(Path("/proc/self/fd")))
    for _ in range(3000):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    with pytest.raises(SandboxFileError, match="too long"):
        list_changes(tmp_path)
    os.close(folder)
    assert len(names(Path("/proc/self/fd"))) < before  # others may have been collected, too
    remove_tree(tmp_path / "d")

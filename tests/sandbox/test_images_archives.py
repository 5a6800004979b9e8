"""Layouts and archives: good ones in every form, and hostile ones."""

import asyncio
import io
import json
import os
import tarfile

import pytest
from backports import zstd

from hadal.errors import ImageError
from hadal.node.images.unpack import unpack
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.image_files import (
    MadeImage,
    as_gzip,
    as_zstd,
    digest_of,
    entry,
    folder,
    layer,
    small_image,
)

pytestmark = needs_root


def as_tar(root):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, path.relative_to(root), recursive=False)
    return made.getvalue()


@pytest.mark.parametrize("form", ["layout", "oci archive", "docker save"])
@pytest.mark.parametrize("compress", [as_gzip, as_zstd, bytes], ids=["gzip", "zstd", "plain"])
def test_every_form_gives_the_same_image(store, tmp_path, form, compress, merged):
    image = small_image(Env=["A=b"])
    layout = image.write_layout(tmp_path / "layout")
    archive = tmp_path / "archive"
    archive.write_bytes(compress(image.docker_save() if form == "docker save" else as_tar(layout)))

    async def main():
        if form == "layout":
            record = await store.import_layout(layout)
        else:
            record = await store.import_archive(archive)
        assert record.name == "docker.io/team/tool:1"
        assert record.layers == tuple(reversed(image.diff_ids))
        async with store.using("team/tool:1") as resolved:
            assert names(merged(resolved) / "etc") == ["changed", "kept"]
            assert resolved.config.environment == {"A": "b"}
        await store.prune()
        assert names(store.root / "staging") == []

    asyncio.run(main())


@pytest.mark.parametrize("called", ["latest", "", "not/A/name"])
def test_a_layout_without_a_usable_name_needs_one(open_store, tmp_path, called):
    store = open_store(erofs=False)
    small_image().write_layout(tmp_path / "layout", called)

    async def main():
        with pytest.raises(ImageError, match=r"does not say|not the name"):
            await store.import_layout(tmp_path / "layout")
        assert (await store.import_layout(tmp_path / "layout", name="mine")).name == "mine"

    asyncio.run(main())


def test_one_of_several_is_selected(open_store, tmp_path):
    store = open_store(erofs=False)
    first = small_image()
    first.write_layout(tmp_path / "both", "first")
    one = json.loads((tmp_path / "both/index.json").read_text())["manifests"]
    MadeImage([layer(entry("x"))]).write_layout(tmp_path / "both", "second")
    index = json.loads((tmp_path / "both/index.json").read_text())
    index["manifests"] += one
    (tmp_path / "both/index.json").write_text(json.dumps(index))

    async def main():
        with pytest.raises(ImageError, match="there are: second, first"):
            await store.import_layout(tmp_path / "both")
        record = await store.import_layout(tmp_path / "both", select="first", name="mine")
        assert (record.name, record.layers) == ("mine", tuple(reversed(first.diff_ids)))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("blob is a link outside", "not a file of this image"),
        ("blob is a fifo", "not a file of this image"),
        ("blob is a directory", "not a file of this image"),
        ("blob is damaged", "has digest"),
        ("blob is longer", "bytes, expected"),
        ("no blobs", "No such file"),
        ("huge index", "expected at most"),
        ("not an image", "is not an image"),
        ("docker layer outside", "not a file of this image"),
        ("docker config absolute", "not a file of this image"),
    ],
)
def test_hostile_layouts(open_store, tmp_path, fault, message):
    store = open_store(erofs=False)
    image = small_image()
    root = image.write_layout(tmp_path / "layout")
    blob = root / "blobs/sha256" / image.layer_descriptors[0]["digest"][7:]
    data = blob.read_bytes()
    outside = tmp_path / "outside"
    outside.write_bytes(data)
    match fault:
        case "blob is a link outside":
            blob.unlink()
            blob.symlink_to(outside)
        case "blob is a fifo":
            blob.unlink()
            os.mkfifo(blob)
        case "blob is a directory":
            blob.unlink()
            blob.mkdir()
        case "blob is damaged":
            blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "blob is longer":
            blob.write_bytes(data + b"x")
        case "no blobs":
            blob.unlink()
        case "huge index":
            with (root / "index.json").open("ab") as file:
                file.truncate(100 << 20)
        case "not an image":
            (root / "index.json").unlink()
        case _:
            (root / "index.json").unlink()
            (root / "config.json").write_bytes(image.blobs[image.config["digest"]])
            paths = ["../outside", "../outside"] if "layer" in fault else ["config.json"] * 2
            config = str(outside) if "absolute" in fault else "config.json"
            listed = [{"Config": config, "RepoTags": ["a:1"], "Layers": paths}]
            (root / "manifest.json").write_text(json.dumps(listed))

    async def main():
        with pytest.raises(ImageError, match=message):
            await store.import_layout(root)
        await store.close()  # another layer may have come through: its folder goes soon after
        assert names(store.root / "staging") == []
        assert names(store.root / "images") == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("../out", b"x")], "out: Invalid cross-device link"),
        ([entry("a/../../out", b"x")], "out: Invalid cross-device link"),
        (
            [entry("l", type=tarfile.SYMTYPE, linkname="/"), entry("l/../../out", b"x")],
            "cross-device",
        ),
        ([entry("h", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")], "h: "),
        ([entry("h", type=tarfile.LNKTYPE, linkname="none")], "h: No such file"),
        ([entry("s", b"x", type=b"S")], "not supported"),
        ([folder("a/" * 300), entry("n" * 300, b"x")], "File name too long"),
        ([entry("a" * 5000, b"x")], "File name too long"),
        ([entry("b" * 10, b"x", type=b"Z")], "not supported"),
    ],
)
def test_hostile_layers_are_refused(tmp_path, entries, message):
    (tmp_path / "layer").write_bytes(layer(*entries))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/tree").mkdir()
    with pytest.raises(ImageError, match=message):
        unpack(tmp_path / "layer", tmp_path / "in/tree", bytes_max=1 << 20)
    assert names(tmp_path / "in") == ["tree"]


def test_hostile_layers_stay_inside(tmp_path):
    """What is unpacked through links goes to where they lead inside the layer."""
    entries = [
        entry("/absolute", b"1"),
        entry("link", type=tarfile.SYMTYPE, linkname="/etc"),
        entry("link/inside", b"2"),
        entry("up", type=tarfile.SYMTYPE, linkname="../../../../tmp"),
        folder("tmp"),
        folder("etc"),
        entry("up/inside", b"3"),
        entry(".wh..wh.aufs"),
        entry("etc/.wh..", b""),
        entry("device", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
        entry(
            "redirected",
            type=tarfile.DIRTYPE,
            pax_headers={
                "SCHILY.xattr.trusted.overlay.redirect": "/etc",
                "SCHILY.xattr.user.a": "b",
            },
        ),
    ]
    entries[2], entries[5] = entries[5], entries[2]
    (tmp_path / "layer").write_bytes(layer(*entries))
    tree = tmp_path / "tree"
    tree.mkdir()
    unpack(tmp_path / "layer", tree, bytes_max=1 << 20)
    found = sorted(str(p.relative_to(tree)) for p in tree.rglob("*"))
    assert found == sorted(
        ["absolute", "link", "etc", "etc/inside", "up", "tmp", "tmp/inside", "device", "redirected"]
    )
    assert os.listxattr(tree / "redirected") == ["user.a"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data[:200] + b"\xff" * 50 + data[250:], "damaged|not a tar stream"),
        (lambda data: b"", None),
        (lambda data: b"no tar at all" * 100, "not a tar stream"),
    ],
)
@pytest.mark.parametrize("compress", [as_gzip, as_zstd])
def test_damaged_archives(tmp_path, damage, message, compress):
    data = damage(compress(layer(entry("large", os.urandom(100_000)))))
    (tmp_path / "layer").write_bytes(data)
    (tmp_path / "tree").mkdir()
    if message is None:
        unpack(tmp_path / "layer", tmp_path / "tree", bytes_max=1 << 20)
        return
    with pytest.raises(ImageError, match=message):
        unpack(tmp_path / "layer", tmp_path / "tree", bytes_max=1 << 20)


def test_a_stream_that_wants_all_memory_is_refused(tmp_path):
    packed = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 30})
    (tmp_path / "layer").write_bytes(packed.compress(layer(entry("x", b"x"))) + packed.flush())
    (tmp_path / "tree").mkdir()
    with pytest.raises(ImageError, match="damaged"):
        unpack(tmp_path / "layer", tmp_path / "tree", bytes_max=1 << 20)


def test_the_last_block_may_be_short(tmp_path):
    data = layer(entry("a", b"123"))
    (tmp_path / "layer").write_bytes(data[: 512 + 3])
    (tmp_path / "tree").mkdir()
    assert unpack(tmp_path / "layer", tmp_path / "tree", bytes_max=1 << 20) == digest_of(data[:515])
    assert (tmp_path / "tree/a").read_bytes() == b"123"


def test_several_members_are_one_stream(tmp_path):
    data = layer(entry("a", b"1" * 10_000))
    for compress in (as_gzip, as_zstd):
        (tmp_path / "layer").write_bytes(compress(data[:5000]) + compress(data[5000:]))
        tree = tmp_path / compress.__name__
        tree.mkdir()
        unpack(tmp_path / "layer", tree, bytes_max=1 << 20)
        assert (tree / "a").stat().st_size == 10_000

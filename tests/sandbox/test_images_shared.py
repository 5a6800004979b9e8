"""Layers whose content lies in a folder that several stores see."""

import asyncio
import os

import pytest

from hadal.errors import ImageError
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.image_files import small_image
from tests.sandbox.test_images import listed, make_tree

pytestmark = needs_root


@pytest.fixture
def open_node(open_store, tmp_path):
    """Stores of several machines that see one folder."""

    def open_one(name):
        store = open_store(tmp_path / name, shared=tmp_path / "shared")
        if not store._layers.erofs:
            pytest.skip("EROFS images cannot be made and mounted here")
        return store

    return open_one


def test_content_is_shared_and_metadata_is_not(open_node, tmp_path):
    first, second = open_node("first"), open_node("second")
    make_tree(tmp_path / "tree")
    (tmp_path / "tree/large").write_bytes(os.urandom(3_000_000))

    async def main():
        record = await first.import_directory(tmp_path / "tree", "tree")
        async with first.using("tree") as image:
            assert listed(image.layers[0]) == listed(tmp_path / "tree")
        assert await first.stored_bytes(record) < 100_000
        again = await second.import_directory(tmp_path / "tree", "tree")
        assert again.digest == record.digest
        assert len(names(tmp_path / "shared")) == 2
        # a third machine that has neither the image nor its content
        async with open_node("third").using(record.layers[0]) as image:
            assert listed(image.layers[0]) == listed(tmp_path / "tree")
        await first.remove("tree")
        assert await first.prune() > 0
        assert names(first.root / "layers") == names(first.root / "mounts") == []
        async with second.using("tree") as image:
            assert (image.layers[0] / "large").stat().st_size == 3_000_000

    asyncio.run(main())


def test_what_another_machine_has_put_there_is_not_unpacked(open_node, tmp_path):
    image = small_image()
    root = image.write_layout(tmp_path / "layout")

    async def main():
        record = await open_node("first").import_layout(root)
        for path in (root / "blobs/sha256").iterdir():
            if path.name in [d["digest"][7:] for d in image.layer_descriptors]:
                path.write_bytes(b"gone")
        other = open_node("second")
        assert await other.import_layout(root) == record
        async with other.using(record.name) as resolved:
            assert (resolved.layers[1] / "etc/kept").read_bytes() == b"kept\n"

    asyncio.run(main())


def test_without_its_content_a_layer_is_not_there(open_node, tmp_path):
    store = open_node("first")
    make_tree(tmp_path / "tree")

    async def main():
        record = await store.import_directory(tmp_path / "tree", "tree")
        for path in (tmp_path / "shared").glob("*.blob"):
            path.unlink()
        with pytest.raises(ImageError, match="no layer"):
            await store.acquire("tree")
        with pytest.raises(ImageError, match="no image or layer"):
            await open_node("second").acquire(record.layers[0])
        await store.import_directory(tmp_path / "tree", "tree")
        await store.release(await store.acquire("tree"))

    asyncio.run(main())

"""The image store as a node uses it."""

import asyncio

from hadal.node.images import ImageConfig
from hadal.node.store_images import StoreImages
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.test_images import make_base

pytestmark = needs_root


def test_roots_are_held_for_their_boxes(store, tmp_path):
    make_base(tmp_path / "base")

    async def main():
        config = ImageConfig(environment={"A": "b"}, working_directory="/etc", user="7")
        await store.import_directory(tmp_path / "base", "base", config=config)
        images = StoreImages(store)
        root = await images.acquire("base", "box1")
        assert (root.layers[0] / "etc/kept").exists()
        assert root.defaults.env == {"A": "b"}
        assert (root.defaults.working_dir, root.defaults.user) == ("/etc", "7")
        host = await images.acquire("host", "box2")
        assert host.binds[0][1] == "/usr"
        await images.acquire("base", "box2")
        assert [image.name for image in images.held("box2")] == ["host", "base"]
        for name in ("base", "host"):
            await store.remove(name)
        await images.release("box1")
        assert await store.prune() == 0
        await images.release("box2")
        await images.release("box2")
        assert await store.prune() > 0
        assert names(store.root / "layers") == []

    asyncio.run(main())

"""The store after kill -9, on a full disk, and used by several processes at once."""

import asyncio
import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest

from hadal.errors import ImageError
from hadal.node.images.erofs import unmount
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.image_files import MadeImage, as_gzip, entry, layer
from tests.sandbox.test_images import listed, make_tree

pytestmark = needs_root


def crash(tmp_path, operation, fault, erofs, stride):
    command = [sys.executable, "-m", "tests.sandbox.crash_driver"]
    form = "erofs" if erofs else "directories"
    driven = subprocess.run(
        [*command, operation, fault, form, str(tmp_path), str(stride)],
        capture_output=True,
        text=True,
    )
    assert driven.returncode == 0, driven.stderr[-4000:]
    return int(driven.stdout)


@pytest.mark.parametrize("operation", ["import", "commit", "archive", "pull"])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_every_seventh_step_may_fail(tmp_path, operation, fault, erofs):
    assert crash(tmp_path, operation, fault, erofs, stride=7) > 2


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["import", "commit", "archive", "pull"])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_every_step_may_fail(tmp_path, operation, fault, erofs):
    assert crash(tmp_path, operation, fault, erofs, stride=1) > 20


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["archive", "pull", "commit"])
def test_a_hundred_kills_at_any_time(tmp_path, operation, erofs):
    assert crash(tmp_path, operation, "time", erofs, stride=100) == 100


@pytest.fixture
def small_disk(tmp_path):
    """A disk of so many bytes, at the place of the store."""
    libc = ctypes.CDLL(None, use_errno=True)
    points = []

    def mount(size):
        point = tmp_path / f"disk{size}"
        point.mkdir()
        options = f"size={size},mode=0700".encode()
        assert libc.mount(b"tmpfs", os.fsencode(point), b"tmpfs", 0, options) == 0
        points.append(point)
        return point

    yield mount
    for point in points:
        unmount(point)


@pytest.mark.parametrize("mib", [1, 3, 5, 7, 9, 12, 20])
def test_a_full_disk_is_named_and_left_as_it_was(open_store, erofs, small_disk, tmp_path, mib):
    disk = small_disk(mib << 20)
    store = open_store(disk / "store", erofs=erofs)
    content = os.urandom(4 << 20)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/large").write_bytes(content)
    (tmp_path / "tiny").mkdir()
    archive = MadeImage([layer(entry("large", content))], as_gzip).docker_save()
    (tmp_path / "archive").write_bytes(archive)

    async def main():
        await store.import_directory(tmp_path / "tiny", "tiny")
        await store.prune()
        before = shutil.disk_usage(disk).used
        reasons = []
        async with store.using(tmp_path / "tiny") as base:  # no EROFS is mounted from a tmpfs
            for work in (
                lambda: store.import_directory(tmp_path / "tree", "tree"),
                lambda: store.commit(tmp_path / "tree", base, name="snap"),
                lambda: store.import_archive(tmp_path / "archive", name="archive"),
            ):
                try:
                    await work()
                except ImageError as error:
                    reasons.append(f"{error.message} {error.hint}")
                else:
                    for name in {r.name for r in await store.list()} - {"tiny"}:
                        await store.remove(name)
                await store.prune()
                assert names(store.root / "staging") == []
                assert [r.name for r in await store.list()] == ["tiny"]
                assert shutil.disk_usage(disk).used <= before + (64 << 10)
        assert all(re.search("No space left.*prune", reason) for reason in reasons), reasons
        assert len(reasons) == 3 or mib > 4
        assert not reasons or mib < 20

    asyncio.run(main())


def test_where_erofs_cannot_be_mounted_layers_are_directories(
    open_store, small_disk, tmp_path, caplog
):
    """A tmpfs holds no image that the kernel would mount; a store there works all the same."""
    store = open_store(small_disk(8 << 20) / "store")
    make_tree(tmp_path / "tree")

    async def main():
        for _ in range(2):
            await store.import_directory(tmp_path / "tree", "tree")
            async with store.using("tree") as image:
                assert image.layers[0].suffix == ".tree"
                assert listed(image.layers[0]) == listed(tmp_path / "tree")

    asyncio.run(main())
    said = [r.message for r in caplog.records if "EROFS cannot be mounted here" in r.message]
    assert len(said) == (shutil.which("mkfs.erofs") is not None)


WORKER = """
import asyncio, random, sys
from pathlib import Path
from hadal.errors import ImageError
from hadal.node.images import ImageStore, RegistrySettings
root, source, erofs, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
dice = random.Random(seed)
async def main():
    store = ImageStore(root, erofs=erofs, idle_mounts_max=1,
        registry=RegistrySettings(attempts=1))
    for _ in range(30):
        name = dice.choice(["a", "b", "c"])
        match dice.randrange(4):
            case 0 | 1:
                await store.import_directory(source / name, f"127.0.0.1:1/t/{name}")
            case 2:
                await store.prune()
            case 3:
                try:
                    await store.remove(f"127.0.0.1:1/t/{name}")
                except ImageError as error:
                    assert "no image" in str(error)
        try:
            image = await store.acquire(f"127.0.0.1:1/t/{name}")
        except ImageError as error:
            # removed meanwhile: then it is looked for in a registry, or its layer is gone
            assert "cannot pull" in str(error) or "no layer" in str(error), error
            continue
        await asyncio.sleep(dice.random() / 100)
        assert (image.layers[0] / name).read_text() == name * 1000
        await store.release(image)
asyncio.run(main())
"""


def test_several_processes_at_once(open_store, erofs, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name * 1000)
    store = open_store(erofs=erofs)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, store.root, tmp_path, str(erofs), str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors

    async def main():
        await store.prune()
        kept = {layer for record in await store.list() for layer in record.layers}
        assert {f"sha256:{name.split('.')[0]}" for name in names(store.root / "layers")} == kept
        for folder in ("staging", "mounts"):
            assert names(store.root / folder) == [], folder

    asyncio.run(main())


def test_one_image_by_several_processes_is_one_layer(open_store, tmp_path):
    make_tree(tmp_path / "tree")
    code = (
        "import asyncio, sys; from pathlib import Path; from hadal.node.images import ImageStore\n"
        "store = ImageStore(Path(sys.argv[1]), erofs=False)\n"
        "asyncio.run(store.import_directory(Path(sys.argv[2]), sys.argv[3]))"
    )
    store = open_store(erofs=False)
    started = [
        subprocess.Popen([sys.executable, "-c", code, store.root, tmp_path / "tree", f"n{i}"])
        for i in range(3)
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert len(names(store.root / "layers")) == 1
    assert len(asyncio.run(store.list())) == 3

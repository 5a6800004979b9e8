"""The image store: what goes in comes out, in use it stays, unused it goes."""

import asyncio
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hadal.errors import ImageError
from hadal.node.images import ImageConfig, ImageStore
from hadal.node.images.erofs import make_erofs
from hadal.node.images.records import ImageRecord, file_name
from hadal.node.images.references import Reference
from hadal.node.images.tree import copy_tree, remove_tree
from tests.sandbox.conftest import names, needs_root

pytestmark = needs_root


def make_tree(root, order=1):
    """One of each kind; made in another order, it is the same."""
    root.mkdir()
    steps = [
        lambda: (root / "plain").write_bytes(b"content" * 1000),
        lambda: (root / "empty").touch(),
        lambda: (root / "folder/deep").mkdir(parents=True),
        lambda: (root / "link").symlink_to("folder/none"),
        lambda: os.mkfifo(root / "fifo"),
        lambda: os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        lambda: (root / "odd \n\xff").write_bytes(b"1"),
        lambda: (root / "large id").write_bytes(b"2"),
    ]
    for step in steps[::order]:
        step()
    (root / "hard").hardlink_to(root / "plain")
    os.chown(root / "large id", 70000, 100000)
    (root / "plain").chmod(0o4755)
    os.setxattr(root / "plain", "user.note", b"\0\xff")
    os.setxattr(root / "folder", "trusted.mark", b"1")
    (root / "folder/deep").chmod(0o1777)
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(5, 1_600_000_000_123_456_789), follow_symlinks=False)


def listed(root):
    """What a tree is, for comparison."""
    found = {}
    for path in sorted((root, *root.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        names = os.listxattr(path, follow_symlinks=False)
        found[str(path.relative_to(root))] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_rdev,
            content,
            path.readlink() if path.is_symlink() else None,
            {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
        )
    return found


def test_a_directory_comes_back_as_it_was(store, tmp_path):
    make_tree(tmp_path / "tree")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "tree/socket"))
    os.utime(tmp_path / "tree", ns=(5, 1_600_000_000_123_456_789))

    async def main():
        record = await store.import_directory(tmp_path / "tree", "mine")
        async with store.using("mine") as image:
            (tmp_path / "tree/socket").unlink()
            os.utime(tmp_path / "tree", ns=(5, 1_600_000_000_123_456_789))
            assert listed(image.layers[0]) == listed(tmp_path / "tree")
            assert (image.layers[0] / "hard").stat().st_nlink == 2
            assert (image.digest, image.references) == (record.digest, record.layers)
            with pytest.raises(OSError, match=r"Read-only|exists") as refused:
                (image.layers[0] / "plain").open("x")
            assert refused.value

    asyncio.run(main())


def test_equal_trees_have_equal_digests_and_images(tmp_path, open_store):
    digests = set()
    for order in (1, -1):
        make_tree(tmp_path / f"tree{order}", order)
        copied = copy_tree(tmp_path / f"tree{order}", tmp_path / f"copy{order}")
        digests.add(copied.digest)
        if shutil.which("mkfs.erofs"):
            make_erofs(tmp_path / f"copy{order}", tmp_path / f"{order}.erofs", compress=False)
            make_erofs(tmp_path / f"copy{order}", tmp_path / f"{order}.lz4", compress=True)
    assert len(digests) == 1
    assert copied.entries == 10 + 1
    for kind in ("erofs", "lz4") if shutil.which("mkfs.erofs") else ():
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"-1.{kind}").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "plain").write_bytes(b"content" * 999 + b"Content"),
        lambda root: (root / "plain").chmod(0o755),
        lambda root: os.chown(root / "empty", 1, 0),
        lambda root: os.utime(root / "folder", ns=(0, 1)),
        lambda root: os.setxattr(root / "plain", "user.note", b"\0\xfe"),
        lambda root: (root / "empty").rename(root / "empty2"),
        lambda root: [(root / "link").unlink(), (root / "link").symlink_to("folder/other")],
        lambda root: [(root / "hard").unlink(), shutil.copy2(root / "plain", root / "hard")],
    ],
)
def test_every_change_changes_the_digest(tmp_path, change):
    make_tree(tmp_path / "tree")
    before = copy_tree(tmp_path / "tree", tmp_path / "before").digest
    change(tmp_path / "tree")
    assert copy_tree(tmp_path / "tree", tmp_path / "after").digest != before


def make_upper(root):
    """The upper directory of an overlay over {etc/{kept,removed}, hidden/old}."""
    (root / "etc").mkdir(parents=True)
    (root / "etc/new").write_text("new\n")
    os.mknod(root / "etc/removed", stat.S_IFCHR, 0)
    (root / "hidden").mkdir()
    (root / "hidden/young").write_text("y\n")
    os.setxattr(root / "hidden", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "etc", "trusted.overlay.impure", b"y")
    os.setxattr(root / "etc/new", "trusted.overlay.origin", b"where it was")
    return root


def make_base(root):
    for path in ("etc/kept", "etc/removed", "hidden/old"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{path}\n")
    return root


def test_commit_keeps_what_was_removed(store, tmp_path, merged):
    upper = make_upper(tmp_path / "upper")

    async def main():
        await store.import_directory(make_base(tmp_path / "base"), "base")
        async with store.using("base") as base:
            first = await store.commit(upper, base, name="snap")
            os.setxattr(upper / "etc/new", "trusted.overlay.origin", b"elsewhere")
            again = await store.commit(upper, base)
        assert first.digest == again.digest == again.name
        assert len(first.layers) == 2
        async with store.using("snap") as image:
            seen = merged(image)
            assert names(seen / "etc") == ["kept", "new"]
            assert names(seen / "hidden") == ["young"]
            kept = os.listxattr(image.layers[0] / "hidden")
            assert kept == ["trusted.overlay.opaque"]
            assert os.listxattr(image.layers[0] / "etc/new") == []
            # and on top of that once more
            (tmp_path / "upper2").mkdir()
            (tmp_path / "upper2/third").touch()
            third = await store.commit(
                tmp_path / "upper2", image, config=ImageConfig(user="12", environment={"A": "b"})
            )
        async with store.using(third.digest) as image:
            assert image.references[1:] == first.layers
            assert names(merged(image)) == ["etc", "hidden", "third"]
            assert image.config.user == "12"

    asyncio.run(main())


def test_commit_takes_nothing_from_the_host_through_a_changing_box(store, tmp_path):
    """Links in an upper directory stay links, and a redirect is refused."""
    upper = tmp_path / "upper"
    upper.mkdir()
    (upper / "shadow").symlink_to("/etc/shadow")
    (upper / "etc").symlink_to("/etc")

    async def main():
        async with store.using("host") as base:
            image = await store.commit(upper, base)
            async with store.using(image.digest) as made:
                assert (made.layers[0] / "shadow").is_symlink()
                assert (made.layers[0] / "etc").is_symlink()
            (upper / "moved").mkdir()
            os.setxattr(upper / "moved", "trusted.overlay.redirect", b"/etc")
            with pytest.raises(ImageError, match="refers to a lower layer"):
                await store.commit(upper, base)

    asyncio.run(main())


def test_commit_of_too_much_is_refused(open_store, tmp_path):
    store = open_store(erofs=False, layer_bytes_max=1 << 20)
    (tmp_path / "upper").mkdir()
    with (tmp_path / "upper/sparse").open("wb") as file:
        file.truncate(1 << 40)

    async def main():
        async with store.using("host") as base:
            with pytest.raises(ImageError, match="more than 1,048,576 bytes"):
                await store.commit(tmp_path / "upper", base)
        await store.prune()
        assert names(store.root / "staging") == []

    asyncio.run(main())


def test_host_boots(store, with_box):
    async def main():
        return await store.acquire("host")

    image = asyncio.run(main())
    has_certificates = Path("/etc/ssl/certs").exists()

    async def body(box):
        _, out, err = await box.shell("id -un; ls -ld /tmp; awk 'BEGIN {print 6 * 7}'; pwd")
        assert out.split()[0:2] == [b"root", b"drwxrwxrwt"], err
        assert b"42" in out
        _, out, err = await box.run(
            "python3", "-c", "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
        )
        assert int(out) > 0 or not has_certificates, err
        assert (await box.shell("cat /etc/hostname /etc/shadow /etc/ssl/private/*"))[1] == b""
        assert (await box.shell("touch /usr/x"))[0].status

    with_box(body, layers=image.layers, binds=image.binds)
    asyncio.run(store.release(image))


def test_a_directory_is_used_in_place(store, tmp_path):
    make_base(tmp_path / "base")
    make_base(tmp_path / "upper")

    async def main():
        for reference in (tmp_path / "base", str(tmp_path / "base")):
            async with store.using(reference) as image:
                assert image.layers == (tmp_path / "base",)
                assert image.digest is None
                made = await store.commit(tmp_path / "upper", image)
                assert made.layers[1] == str(tmp_path / "base")
        async with store.using(made.digest) as image:
            assert image.layers[1] == tmp_path / "base"
        with pytest.raises(ImageError, match="is not a directory"):
            await store.acquire("/nowhere")

    asyncio.run(main())
    assert len(names(store.root / "layers")) == 1


def test_what_is_used_is_never_pruned(store, tmp_path):
    make_base(tmp_path / "base")

    async def main():
        record = await store.import_directory(tmp_path / "base", "base")
        image = await store.acquire("base")
        again = await store.acquire(record.layers[0])
        await store.remove("base")
        assert await store.prune() == 0
        await store.release(image)
        other = ImageStore(store.root, erofs=store._layers.erofs)
        assert await other.prune() == 0
        assert (again.layers[0] / "etc/kept").exists()
        await store.release(again)
        assert await store.prune(in_use=record.layers) == 0
        assert await other.prune() > 0
        assert names(store.root / "layers") == []
        assert names(store.root / "mounts") == []
        with pytest.raises(ImageError, match="no image or layer"):
            await store.acquire(record.layers[0])

    asyncio.run(main())


HOLDER = """
import asyncio, sys
from pathlib import Path
from hadal.node.images import ImageStore
async def main():
    store = ImageStore(Path(sys.argv[1]), erofs=sys.argv[2] == "True")
    image = await store.acquire("base")
    print(image.layers[0], flush=True)
    sys.stdin.read()
    await store.release(image)
asyncio.run(main())
"""


def test_another_process_holds_what_it_uses_until_it_ends(store, erofs, tmp_path):
    make_base(tmp_path / "base")

    def start():
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, store.root, str(erofs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return holder, holder.stdout.readline().strip()

    async def main():
        await store.import_directory(tmp_path / "base", "base")
        holder, path = start()
        with holder:
            async with store.using("base") as image:
                assert str(image.layers[0]) == path
            await store.remove("base")
            assert await store.prune() == 0
            assert names(Path(path))
            holder.kill()
        assert await store.prune() > 0
        assert names(store.root / "mounts") == []

    asyncio.run(main())


def test_mounts_are_shared_and_few_are_kept(open_store, tmp_path):
    store = open_store(idle_mounts_max=2)
    if not store._layers.erofs:
        pytest.skip("EROFS images cannot be made and mounted here")

    def mounted():
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return sum(str(store.root) in line for line in lines)

    async def main():
        for i in range(4):
            (tmp_path / "tree").mkdir(exist_ok=True)
            (tmp_path / "tree/number").write_text(str(i))
            await store.import_directory(tmp_path / "tree", f"image{i}")
        images = [await store.acquire(f"image{i % 4}") for i in range(12)]
        assert mounted() == 4
        for image in images:
            assert (image.layers[0] / "number").exists()
            await store.release(image)
        assert mounted() == 2
        async with store.using("image3"):
            assert mounted() == 2
        await store.prune()
        assert mounted() == 0
        assert len(await store.list()) == 4

    asyncio.run(main())


def test_without_erofs_layers_are_directories_and_it_is_said_once(
    open_store, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr("hadal.node.images.erofs._PATH", "/nowhere")
    caplog.set_level(logging.INFO)
    store = open_store()
    make_base(tmp_path / "base")

    async def main():
        await store.import_directory(tmp_path / "base", "base")
        async with store.using("base") as image:
            assert image.layers[0].suffix == ".tree"

    asyncio.run(main())
    assert [r.message for r in caplog.records if "directories" in r.message] == [
        "layers are kept as directories: mkfs.erofs is not installed"
    ]


def test_names(open_store, tmp_path):
    store = open_store(erofs=False)
    make_base(tmp_path / "base")

    async def main():
        for name in ("", "host", "/a", ".a", "a\nb", "sha256:1", " a", "ü" * 100):
            with pytest.raises(ImageError, match="name"):
                await store.import_directory(tmp_path / "base", name)
        for name in ("a", "A/b:c@d", "ü"):
            await store.import_directory(tmp_path / "base", name)
            await store.release(await store.acquire(name))
        assert [r.name for r in await store.list()] == ["A/b:c@d", "a", "ü"]
        with pytest.raises(ImageError, match="no image 'none'"):
            await store.remove("none")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("a/b", "docker.io/a/b:latest"),
        ("docker.io/debian:12", "docker.io/library/debian:12"),
        ("localhost/x", "localhost/x:latest"),
        ("h.example:5000/a/b/c:T", "h.example:5000/a/b/c:T"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        (f"a@sha256:{'0' * 64}", f"docker.io/library/a@sha256:{'0' * 64}"),
    ],
)
def test_references(text, full):
    assert str(Reference.parse(text)) == full
    assert str(Reference.parse(full)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        "UPPER",
        "a//b",
        "../a",
        "a:b:c",
        "a@sha256:0",
        "h.example/",
        "a b",
        "a/../b",
        "-a",
        "a" * 600,
        "x.y/a?q=1",
        "u@h.x/a",
    ],
)
def test_what_is_no_reference(text):
    with pytest.raises(ImageError, match="not the name of an image"):
        Reference.parse(text)


def test_a_record_that_cannot_be_read_stops_prune(open_store, tmp_path):
    store = open_store(erofs=False)
    make_base(tmp_path / "base")

    async def main():
        await store.import_directory(tmp_path / "base", "base")
        path = store.root / "images" / file_name("base")
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"version": 2}))
        with pytest.raises(ImageError, match="cannot be read"):
            await store.prune()
        assert len(names(store.root / "layers")) == 1

    asyncio.run(main())


def test_a_record_says_what_its_digest_is_of():
    config = ImageConfig(environment={"B": "1", "A": "2"}, command=("x",))
    one = ImageRecord.make("one", ("/a", "/b"), config=config)
    two = ImageRecord.make("two", ("/a", "/b"), config=config, origin="elsewhere")
    assert one.digest == two.digest
    assert one.digest != ImageRecord.make("one", ("/b", "/a"), config=config).digest
    assert ImageRecord.model_validate_json(one.model_dump_json()) == one
    with pytest.raises(ImageError, match="128 layers"):
        ImageRecord.make(None, ("/a",) * 128, config=config)


def test_trees_of_any_depth_are_removed(tmp_path):
    (tmp_path / "top").mkdir()
    fd = os.open(tmp_path / "top", os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with pytest.raises(ImageError, match="256 deep"):
        copy_tree(tmp_path / "top", tmp_path / "copy")
    remove_tree(tmp_path / "top")
    assert not (tmp_path / "top").exists()

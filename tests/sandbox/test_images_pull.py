"""Pulling from a registry that is real, and fails in every way that registries do."""

import asyncio
import os
import re

import pytest

from hadal.errors import ImageError
from hadal.node.images import RegistrySettings
from hadal.node.images.references import Reference
from hadal.node.images.registry import Repository
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.image_files import (
    DOCKER,
    MadeImage,
    as_zstd,
    digest_of,
    entry,
    folder,
    layer,
    small_image,
)
from tests.sandbox.registry_server import RegistryServer

pytestmark = needs_root
LARGE = os.urandom(3_000_000)


@pytest.fixture
def server():
    return RegistryServer()


@pytest.fixture
def pulling(open_store, server):
    """Run a coroutine function with the store, while the server runs."""

    def run(body, **settings):
        async def main():
            async with server.running():
                registry = RegistrySettings(
                    **{"retry_delay_s": 0.001, "timeout_s": 5} | settings.pop("registry", {})
                )
                await body(open_store(registry=registry, **settings))

        asyncio.run(main())

    return run


def nothing_is_left(store):
    store._layers.settle()
    return names(store.root / "staging") == [] and names(store.root / "images") == []


def test_pull_and_merge(pulling, server, merged, erofs):
    image = small_image(
        Env=["A=b=c", "PATH=/bin", "odd"],
        WorkingDir="/etc",
        User="12:34",
        Cmd=["x"],
        Entrypoint=["e"],
    )
    server.add(image)
    seen = {}

    async def body(store):
        name = f"{server.host}/library/tool:1"
        record = await store.pull(
            name, lambda part, done, total: seen.update({part: (done, total)})
        )
        assert record.name == name
        assert record.layers == tuple(reversed(image.diff_ids))
        assert record.origin.endswith(f"@{image.manifest['digest']}")
        assert record.config.environment == {"A": "b=c", "PATH": "/bin"}
        assert (record.config.working_directory, record.config.user) == ("/etc", "12:34")
        assert (record.config.entrypoint, record.config.command) == (("e",), ("x",))
        assert seen == {
            d: (size, size) for d, size in zip(image.diff_ids, map(len, image.packed), strict=True)
        }
        async with store.using(name) as resolved:
            root = merged(resolved)
            assert names(root) == ["etc", "hard", "hidden", "link"]
            assert names(root / "etc") == ["changed", "kept"]
            assert (root / "etc/changed").read_bytes() == b"new\n"
            assert names(root / "hidden") == ["new"]
            lower = resolved.layers[1] / "etc/changed"
            assert (lower.stat().st_mode & 0o777, lower.stat().st_uid) == (0o640, 12)
            assert lower.stat().st_mtime == 1_600_000_000
        before = len(server.requests)
        await store.pull(name)
        assert not [
            r for r in server.requests[before:] if image.layer_descriptors[0]["digest"] in r[1]
        ]

    pulling(body, erofs=erofs)


def test_acquire_pulls_what_is_missing_once(pulling, server):
    server.add(small_image())

    async def body(store):
        name = f"{server.host}/library/tool:1"
        images = await asyncio.gather(*(store.acquire(name) for _ in range(5)))
        assert len({image.digest for image in images}) == 1
        assert sum("manifests" in path for _, path, _ in server.requests) == 1
        for image in images:
            await store.release(image)

    pulling(body, erofs=False)


def test_the_platform_is_chosen(pulling, server):
    ours, other = small_image(), MadeImage([layer(entry("other"))])
    foreign = other.manifest | {"platform": {"os": "linux", "architecture": "s390x"}}
    server.add(
        other, tag="foreign", top=other.add({"schemaVersion": 2, "manifests": [foreign]}, "")
    )
    server.add(ours, top=ours.index(foreign))

    async def body(store):
        record = await store.pull(f"{server.host}/library/tool:1")
        assert record.layers == tuple(reversed(ours.diff_ids))
        with pytest.raises(ImageError, match="it has linux/s390x"):
            await store.pull(f"{server.host}/library/tool:foreign")

    pulling(body, erofs=False)


@pytest.mark.parametrize("compress", [as_zstd, lambda data: data], ids=["zstd", "plain"])
def test_other_compressions_and_docker_types(pulling, server, compress):
    image = MadeImage([layer(folder("a"), entry("a/b", LARGE))], compress)
    image.layer_descriptors[0]["mediaType"] = f"{DOCKER}.image.rootfs.diff.tar"
    image.remake(mediaType=f"{DOCKER}.distribution.manifest.v2+json")
    server.add(image)

    async def body(store):
        async with store.using(f"{server.host}/library/tool:1") as resolved:
            assert (resolved.layers[0] / "a/b").read_bytes() == LARGE

    pulling(body, erofs=False)


def test_by_digest_nothing_else_will_do(pulling, server):
    image = small_image()
    server.add(image)
    wanted = image.manifest["digest"]

    async def body(store):
        name = f"{server.host}/library/tool@{wanted}"
        assert (await store.pull(name)).name == name
        server.damage.add(wanted)
        with pytest.raises(ImageError, match="the manifest has digest"):
            await store.pull(name)

    pulling(body, erofs=False)


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_blob_that_breaks_off_is_continued(pulling, server, ignore_range):
    image = MadeImage([layer(entry("large", LARGE))])
    server.add(image)
    server.ignore_range = ignore_range

    async def body(store):
        server.cut_after = [1_000_000, 500_000]
        async with store.using(f"{server.host}/library/tool:1") as resolved:
            assert (resolved.layers[0] / "large").read_bytes() == LARGE
        ranges = [
            r for _, path, r in server.requests if image.layer_descriptors[0]["digest"] in path
        ]
        assert ranges[0] is None
        assert len(ranges) == 3
        first, second = (int(re.findall(r"\d+", r)[0]) for r in ranges[1:])
        assert 0 < first <= 1_000_000
        assert 0 < second <= (500_000 if ignore_range else first + 500_000)

    pulling(body, erofs=False)


def test_a_busy_registry_is_asked_again(pulling, server):
    server.add(small_image())

    async def body(store):
        server.unavailable = 3
        await store.pull(f"{server.host}/library/tool:1")
        server.unavailable = 100
        with pytest.raises(ImageError, match="status 503"):
            await store.pull(f"{server.host}/library/tool:1")

    pulling(body, erofs=False)


def test_token_and_basic(pulling, server):
    server.add(small_image(), repository="team/tool")
    name = "team/tool:1"

    async def anonymous(store):
        server.token = "t1"
        await store.pull(f"{server.host}/{name}")
        assert server.tokens_given == 1

    pulling(anonymous, erofs=False)

    async def wrong(store):
        server.basic = ("user", "pass:word")
        with pytest.raises(ImageError, match=r"no token .*not allowed \(401\)"):
            await store.pull(f"{server.host}/{name}")
        server.token = None
        with pytest.raises(ImageError, match="asks who we are"):
            await store.pull(f"{server.host}/{name}")

    pulling(wrong, erofs=False)


def test_credentials_go_to_their_registry(open_store, server):
    server.add(small_image(), repository="team/tool")
    server.basic = ("user", "pass:word")

    async def main():
        async with server.running():
            for token in ("t2", None):
                server.token = token
                settings = RegistrySettings(credentials={server.host: server.basic})
                store = open_store(registry=settings, erofs=False)
                await store.pull(f"{server.host}/team/tool:1")

    asyncio.run(main())


def test_mirrors_come_first_and_need_not_work(open_store):
    good, broken, own = RegistryServer(), RegistryServer(), RegistryServer()
    image = small_image()
    for server in (good, broken, own):
        server.add(image)
    broken.damage |= {d["digest"] for d in image.layer_descriptors}

    async def main():
        async with good.running(), broken.running(), own.running():
            settings = RegistrySettings(
                retry_delay_s=0.001,
                mirrors={
                    "docker.io": (f"http://{broken.host}", f"http://{good.host}"),
                    own.host: ("http://127.0.0.1:1",),
                },
            )
            store = open_store(registry=settings, erofs=False)
            record = await store.pull("tool:1")
            assert record.name == "docker.io/library/tool:1"
            assert good.requests
            await store.pull(f"{own.host}/library/tool:1")
            assert own.requests

    asyncio.run(main())


def test_a_mirror_never_sees_the_password_of_its_registry(open_store):
    mirror, own = RegistryServer(), RegistryServer()
    image = small_image()
    for server in (mirror, own):
        server.add(image)
        server.basic = ("user", "secret")

    async def main():
        async with mirror.running(), own.running():
            settings = RegistrySettings(
                mirrors={own.host: (f"http://{mirror.host}",)}, credentials={own.host: own.basic}
            )
            store = open_store(registry=settings, erofs=False)
            await store.pull(f"{own.host}/library/tool:1")
            assert mirror.requests
            assert set(mirror.given) == {""}
            assert own.basic_header() in own.given

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:80/x", "leads to a server on this machine"),
        ("https://localhost/x", "leads to a server on this machine"),
        ("https://[::1]/x", "leads to a server on this machine"),
        ("http://other.example/x", "not reached by TLS"),
        ("https://a.example:99999/", "leads to"),
        ("ftp://a.example/", "not reached by TLS"),
        ("http://[half", "leads to"),
    ],
)
def test_where_a_registry_may_not_lead(address, message):
    async def main():
        async with Repository.open_session(RegistrySettings()) as session:
            reference = Reference.parse("registry.example/a")
            endpoint = Repository(session, RegistrySettings(), reference)._endpoints[0]
            assert str(endpoint._check_other("/b", endpoint.base)) == "https://registry.example/b"
            with pytest.raises(ImageError, match=message):
                endpoint._check_other(address, endpoint.base)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("damaged layer", "a blob has digest"),
        ("damaged config", "a blob has digest"),
        ("endless", "has more than the"),
        ("missing blob", "not there"),
        ("missing tag", "not there"),
        ("wrong diff id", "unpacks to digest"),
        ("no json", "is not what it should be"),
        ("first version", "is not what it should be"),
        ("counts differ", "a manifest of 1 layers with a config of 2"),
        ("digest with a path", "is not what it should be"),
        ("negative size", "is not what it should be"),
        ("large layer", "expected at most"),
        ("large config", "expected at most"),
        ("nul in config", "the config of"),
        ("redirect to plain http", "not reached by TLS"),
        ("redirect to a file", "not reached by TLS"),
        ("redirect loop", "redirects"),
        ("plain token server", "not reached by TLS"),
        ("token with a line feed", "is not what it should be"),
        ("list of lists", "a list of images that lists lists"),
    ],
)
def test_what_a_bad_registry_says_is_not_believed(pulling, server, fault, message):
    image = small_image()
    digests = [d["digest"] for d in image.layer_descriptors]
    match fault:
        case "damaged layer":
            server.damage.add(digests[1])
        case "damaged config":
            server.damage.add(image.config["digest"])
        case "endless":
            server.endless = True
        case "missing blob":
            del image.blobs[digests[0]]
        case "missing tag":
            image.manifest["digest"] = digest_of(b"none")
        case "wrong diff id":
            image.diff_ids.reverse()
            config = {"rootfs": {"diff_ids": image.diff_ids}}
            image.config = image.add(config, "")
            image.remake()
        case "no json":
            image.manifest = image.add(b"<html>", "")
        case "first version":
            image.remake(schemaVersion=1)
        case "counts differ":
            image.remake(layers=image.layer_descriptors[:1])
        case "digest with a path":
            image.remake(
                layers=[image.layer_descriptors[0] | {"digest": "sha256:../../../etc"}] * 2
            )
        case "negative size":
            image.remake(layers=[image.layer_descriptors[0] | {"size": -1}] * 2)
        case "large layer":
            image.remake(layers=[image.layer_descriptors[0] | {"size": 1 << 40}] * 2)
        case "large config":
            image.remake(config=image.config | {"size": 1 << 40})
        case "nul in config":
            config = {"rootfs": {"diff_ids": image.diff_ids}, "config": {"Env": ["A=\0"]}}
            image.config = image.add(config, "")
            image.remake()
        case "redirect to plain http":
            server.redirect = lambda digest: f"http://registry.example/{digest}"
        case "redirect to a file":
            server.redirect = lambda digest: "file:///etc/passwd"
        case "redirect loop":
            server.redirect = lambda digest: f"/v2/library/tool/blobs/{digest}"
        case "plain token server":
            server.token, server.realm = "t", "http://registry.example/token"
        case "token with a line feed":
            server.token = "a\nX-Other: b"
        case "list of lists":
            inner = image.add({"schemaVersion": 2, "manifests": [image.manifest]}, "")
            image.manifest = image.add({"schemaVersion": 2, "manifests": [inner]}, "")
    server.add(image)

    async def body(store):
        with pytest.raises(ImageError, match=message):
            await store.pull(f"{server.host}/library/tool:1")
        assert nothing_is_left(store)

    pulling(body, erofs=False)


def test_a_layer_that_swells_is_stopped(pulling, server):
    server.add(MadeImage([layer(entry("zeros", bytes(50_000_000)))]))

    async def body(store):
        with pytest.raises(ImageError, match="more than 10,000,000 bytes after decompression"):
            await store.pull(f"{server.host}/library/tool:1")
        assert nothing_is_left(store)

    pulling(body, erofs=False, layer_bytes_max=10_000_000)


def test_a_registry_without_tls_is_not_asked(open_store):
    async def main():
        store = open_store(
            erofs=False, registry=RegistrySettings(mirrors={"docker.io": ("http://m.example",)})
        )
        with pytest.raises(ImageError, match="not reached by TLS") as refused:
            await store.pull("tool:1")
        assert "insecure" in refused.value.hint

    asyncio.run(main())


def test_downloads_at_a_time_are_limited(pulling, server):
    server.add(MadeImage([layer(entry(f"file{i}")) for i in range(9)]))
    server.slow_s = 0.02

    async def body(store):
        await store.pull(f"{server.host}/library/tool:1")
        assert server.most_at_once == 3

    pulling(body, erofs=False, registry={"downloads": 3})


def test_a_pull_that_is_cancelled_leaves_nothing(pulling, server):
    server.add(MadeImage([layer(entry("large", LARGE)), layer(entry("x"))]))
    server.slow_s = 0.1

    async def body(store):
        for delay in (0.0, 0.05, 0.15, *(0.2 + i / 200 for i in range(10))):
            task = asyncio.create_task(store.pull(f"{server.host}/library/tool:1"))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.wait([task])
            await store.prune()
            for record in await store.list():  # it came through just before
                async with store.using(record.name):
                    await store.remove(record.name)
            await store.prune()
            assert nothing_is_left(store)
            assert names(store.root / "layers") == []
        await store.pull(f"{server.host}/library/tool:1")

    pulling(body, erofs=False)

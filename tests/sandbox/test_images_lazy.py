"""Content on demand: chunks from a directory or a web server, their cache, and the file system over it."""

import asyncio
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from hadal.errors import ImageError
from hadal.node.build_boxes import BuildBoxes
from hadal.node.images import RegistrySettings
from hadal.node.images.chunks import CHUNK_BYTES, ChunkCache
from hadal.node.images.erofs import unmount
from hadal.node.images.origins import DirectoryOrigin, HttpOrigin
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.test_images import listed, make_tree

NAME = f"{'a' * 64}.blob"
CONTENT = os.urandom(5 * CHUNK_BYTES + 1234)
SETTINGS = RegistrySettings(attempts=3, retry_delay_s=0.001)


class WebServer:
    """Serves a folder with ranges; so many answers fail first."""

    def __init__(self, folder):
        self.folder = folder
        self.failures = []
        self.requests = []

    async def get(self, request):
        self.requests.append(request.headers.get("Range"))
        match self.failures.pop(0) if self.failures else None:
            case "500":
                return web.Response(status=500)
            case "whole":
                return web.Response(body=b"everything")
            case "redirect":
                raise web.HTTPFound("http://elsewhere.example/")
            case "short":
                headers = {"Content-Range": "bytes 0-9/10", "Content-Length": "1"}
                return web.Response(status=206, body=b"x", headers=headers)
        path = self.folder / request.match_info["name"]
        return web.FileResponse(path) if path.exists() else web.Response(status=404)

    @asynccontextmanager
    async def running(self):
        app = web.Application()
        app.router.add_get("/layers/{name}", self.get)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/layers"
        finally:
            await runner.cleanup()


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    return folder


@pytest.fixture(params=["directory", "web"])
def with_cache(request, shelf, tmp_path):
    """Run a coroutine function with a function that opens caches."""

    def run(body):
        async def main():
            server = WebServer(shelf)
            async with server.running() as url, aiohttp.ClientSession() as session:

                def open_cache(bytes_max=1 << 30):
                    origin = (
                        DirectoryOrigin(shelf)
                        if request.param == "directory"
                        else HttpOrigin(session, url, SETTINGS)
                    )
                    return ChunkCache(tmp_path / "cache", origin, bytes_max=bytes_max)

                await body(open_cache)

        asyncio.run(main())

    return run


def test_every_piece_is_right_and_fetched_once(with_cache):
    async def body(open_cache):
        cache = open_cache()
        assert await cache.size(NAME) == len(CONTENT)
        assert await cache.size("b" * 64) is None
        for offset, length in (
            (0, 10),
            (CHUNK_BYTES - 5, 10),
            (100, 3 * CHUNK_BYTES),
            (len(CONTENT) - 3, 99),
        ):
            assert await cache.read(NAME, offset, length) == CONTENT[offset : offset + length]
        assert await cache.read(NAME, len(CONTENT), 5) == b""
        everything = await asyncio.gather(*(cache.read(NAME, 0, len(CONTENT)) for _ in range(5)))
        assert set(everything) == {CONTENT}
        assert cache.fetched == 6
        await cache.close()
        again = open_cache()
        assert await again.read(NAME, 0, len(CONTENT)) == CONTENT
        assert again.fetched == 0
        await again.close()

    with_cache(body)


def test_what_was_read_first_is_fetched_ahead(with_cache, tmp_path, shelf):
    async def body(open_cache):
        cache = open_cache()
        for index in (3, 0, 5):
            await cache.read(NAME, index * CHUNK_BYTES, 1)
        await cache.close()
        trace = tmp_path / "cache" / NAME / "trace"
        assert trace.read_text() == "3 0 5"
        for chunk in (tmp_path / "cache" / NAME).glob("0*"):
            chunk.unlink()
        trace.rename(shelf / f"{NAME}.trace")
        cache = open_cache()
        await cache.read(NAME, CHUNK_BYTES, 1)
        await asyncio.gather(*cache._ahead)
        assert cache.fetched == 4
        for index in (3, 0, 5):
            await cache.read(NAME, index * CHUNK_BYTES, 1)
        assert cache.fetched == 4
        await cache.close()
        (tmp_path / "cache" / NAME / "trace").write_text("x -1 99999 1e9 2")
        cache = open_cache()
        await cache.read(NAME, 0, 1)
        await asyncio.gather(*cache._ahead)
        assert cache.fetched == 1  # what is nonsense in a record is left alone
        await cache.close()

    with_cache(body)


def test_a_cache_stays_within_its_size(with_cache, tmp_path):
    async def body(open_cache):
        cache = open_cache(bytes_max=2 * CHUNK_BYTES)
        for _ in range(2):
            assert await cache.read(NAME, 0, len(CONTENT)) == CONTENT
        chunks = list((tmp_path / "cache" / NAME).glob("0*"))
        assert sum(path.stat().st_size for path in chunks) <= 2 * CHUNK_BYTES
        assert cache.fetched == 12
        await cache.close()

    with_cache(body)


def test_half_a_chunk_is_fetched_again(with_cache, tmp_path):
    async def body(open_cache):
        cache = open_cache()
        await cache.read(NAME, 0, 1)
        (tmp_path / "cache" / NAME / "00000000").write_bytes(b"half")
        (tmp_path / "cache" / "1.part").write_bytes(b"left")
        await cache.close()
        again = open_cache()
        assert await again.read(NAME, 0, 100) == CONTENT[:100]
        assert again.fetched == 1
        assert "1.part" not in names(tmp_path / "cache")
        await again.close()

    with_cache(body)


def test_what_a_server_does_wrong(shelf, tmp_path):
    async def main():
        server = WebServer(shelf)
        async with server.running() as url, aiohttp.ClientSession() as session:
            origin = HttpOrigin(session, url, SETTINGS)
            for failures in (["500"], ["short", "500"], ["whole"]):
                server.failures = failures
                assert await origin.read(NAME, 10, 20) == CONTENT[10:30]
            for failure, message in (
                ("500", "status 500"),
                ("redirect", "302"),
                ("whole", "a part"),
            ):
                server.failures = [failure] * 3
                with pytest.raises(ImageError, match=message):
                    await origin.read(NAME, 0, 10)
            cache = ChunkCache(tmp_path / "cache", origin, bytes_max=1 << 30)
            server.failures = ["500"] * 3
            with pytest.raises(ImageError, match="status 500"):
                await cache.read(NAME, 0, 10)
            assert await cache.read(NAME, 0, 10) == CONTENT[:10]
            await cache.close()
        with pytest.raises(ImageError, match="not reached by TLS"):
            HttpOrigin(session, "http://elsewhere.example/", SETTINGS)

    asyncio.run(main())


@needs_root
@pytest.mark.skipif(
    importlib.util.find_spec("pyfuse3") is None or not Path("/dev/fuse").exists(),
    reason="pyfuse3 (hadal[fuse]) or /dev/fuse is missing",
)
def test_a_layer_is_read_through_the_file_system(open_store, tmp_path):
    publisher = open_store(tmp_path / "publisher", shared=tmp_path / "shelf")
    if not publisher._layers.erofs:
        pytest.skip("EROFS images cannot be made and mounted here")
    make_tree(tmp_path / "tree")
    (tmp_path / "tree/large").write_bytes(CONTENT)
    point = tmp_path / "point"
    point.mkdir()
    shown = []

    async def main():
        record = await publisher.import_directory(tmp_path / "tree", "tree")
        server = WebServer(tmp_path / "shelf")
        async with server.running() as url:
            command = [
                sys.executable,
                "-m",
                "hadal.node.images.lazy",
                url,
                point,
                tmp_path / "cache",
            ]
            serving = await asyncio.create_subprocess_exec(*map(str, command))
            try:
                while not await asyncio.to_thread(point.is_mount):
                    assert serving.returncode is None
                    await asyncio.sleep(0.02)
                node = open_store(tmp_path / "node", shared=point)
                image = await node.acquire(record.layers[0])
                read = sum("bytes=" in r for r in server.requests)
                assert read < 6, "mounting reads metadata"
                found = await asyncio.to_thread(listed, image.layers[0])
                assert found == listed(tmp_path / "tree")
                # A box whose users are none of this host reads through it too.
                async with node.using("host") as host, BuildBoxes.open(shown.append) as boxes:
                    both = replace(host, layers=(*image.layers, *host.layers))
                    await boxes.run(both, "md5sum < /large; id -u")
                digest = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
                assert b"".join(shown).decode().split() == [digest, "-", "0"]
                await node.release(image)
                await node.prune()
                # What this node makes itself stays here: the file system is read-only.
                (tmp_path / "tree/large").unlink()
                await node.import_directory(tmp_path / "tree", "own")
                await node.release(await node.acquire("own"))
                await node.prune()
            finally:
                serving.send_signal(signal.SIGTERM)
                await serving.wait()
        assert serving.returncode == 0
        assert not point.is_mount()
        assert next((tmp_path / "cache").glob("*.blob/trace")).read_text()

    try:
        asyncio.run(main())
    finally:
        unmount(point)


def test_without_pyfuse3_it_says_so(tmp_path):
    if importlib.util.find_spec("pyfuse3") is not None:
        pytest.skip("it is installed here")
    command = [sys.executable, "-m", "hadal.node.images.lazy", str(tmp_path), str(tmp_path), "x"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "pyfuse3" in failed.stderr

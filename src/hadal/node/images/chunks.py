"""A cache of the files of an origin, in chunks, on the disk of a node.

A chunk is fetched when it is first read, by everybody who waits for it once, and kept until the cache is
full. Which chunks were read first is recorded; where a record is, beside the cached file or at the origin
(`NAME.trace`), the chunks that it lists are fetched ahead.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.images.failures import image_errors
from hadal.node.images.origins import Origin

__all__ = ["CHUNK_BYTES", "ChunkCache"]

CHUNK_BYTES = 1 << 20
_LOG = logging.getLogger(__name__)
_AHEAD = 4
"""Chunks that are fetched ahead at a time."""
_TRACE_BYTES_MAX = 1 << 20


class ChunkCache:
    """The chunks of the files of one origin.

    Args:
        folder: On a local disk; only one process uses it.
        origin: Where the files are.
        bytes_max: That chunks may take.

    Attributes:
        fetched: Chunks that came from the origin.

    Raises:
        ImageError: The folder cannot be made or read.
    """

    def __init__(self, folder: Path, origin: Origin, *, bytes_max: int) -> None:
        self.fetched = 0
        self._folder = folder
        self._origin = origin
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[Path, int] = OrderedDict()  # the longest unused first
        self._sizes: dict[str, int] = {}
        self._fetching: dict[tuple[str, int], asyncio.Task[bytes]] = {}
        self._traces: dict[str, dict[int, None]] = {}
        self._ahead: set[asyncio.Task[None]] = set()
        with image_errors("read the cache of shared layers"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in folder.glob("*.part"):
                part.unlink()
            chunks = [(p, p.stat()) for p in folder.glob("*/*") if p.name != "trace"]
            for path, status in sorted(chunks, key=lambda chunk: chunk[1].st_mtime_ns):
                self._kept[path] = status.st_size
                self._bytes += status.st_size

    async def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if the origin has none of this name.

        Raises:
            ImageError: The origin cannot be asked.
        """
        if name not in self._sizes:
            size = await self._origin.size(name)
            if size is None:
                return None
            self._sizes[name] = size
        return self._sizes[name]

    async def read(self, name: str, offset: int, length: int) -> bytes:
        """Return bytes of a file, less at its end.

        Raises:
            ImageError: They cannot be had.
        """
        size = await self.size(name)
        if size is None:
            raise ImageError(f"{name} is gone from its origin")
        end = min(offset + length, size)
        if name not in self._traces:
            self._traces[name] = {}
            task = asyncio.create_task(self._fetch_ahead(name))
            self._ahead.add(task)
            task.add_done_callback(self._ahead.discard)
        parts: list[bytes] = []
        for index in range(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            self._traces[name].setdefault(index)
            chunk = await self._get(name, index)
            start = index * CHUNK_BYTES
            parts.append(chunk[max(0, offset - start) : end - start])
        return b"".join(parts)

    async def _get(self, name: str, index: int) -> bytes:
        task = self._fetching.get((name, index))
        if task is None:
            task = asyncio.create_task(self._load(name, index))
            self._fetching[name, index] = task
            task.add_done_callback(lambda _: self._fetching.pop((name, index), None))
        return await asyncio.shield(task)

    async def _load(self, name: str, index: int) -> bytes:
        start = index * CHUNK_BYTES
        length = min(CHUNK_BYTES, self._sizes[name] - start)
        path = self._folder / name / f"{index:08x}"
        if path in self._kept:
            self._kept.move_to_end(path)
            data = await asyncio.to_thread(_read_or_nothing, path)
            if len(data) == length:
                return data
        data = await self._origin.read(name, start, length)
        self.fetched += 1
        try:
            await asyncio.to_thread(self._keep, path, data)
        except OSError as error:
            _LOG.warning("a chunk cannot be kept, it will be fetched again: %s", error)
        else:
            self._bytes += length - self._kept.pop(path, 0)
            self._kept[path] = length
            self._evict()
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        part = self._folder / f"{secrets.token_hex(8)}.part"
        try:
            part.write_bytes(data)
            path.parent.mkdir(exist_ok=True)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _evict(self) -> None:
        while self._bytes > self._bytes_max and len(self._kept) > 1:
            path, size = self._kept.popitem(last=False)
            self._bytes -= size
            path.unlink(missing_ok=True)

    async def _fetch_ahead(self, name: str) -> None:
        """Fetch the chunks that were read first when the file was last used."""
        room = asyncio.Semaphore(_AHEAD)

        async def get(index: int) -> None:
            async with room:
                await self._get(name, index)

        try:
            wanted = await self._read_trace(name)
            await asyncio.gather(*(get(index) for index in wanted))
        except ImageError as error:
            _LOG.warning("%s is not fetched ahead: %s", name, error)

    async def _read_trace(self, name: str) -> list[int]:
        data = await asyncio.to_thread(_read_or_nothing, self._folder / name / "trace")
        if not data:
            size = await self._origin.size(f"{name}.trace")
            if size and size <= _TRACE_BYTES_MAX:
                data = await self._origin.read(f"{name}.trace", 0, size)
        last = -(-self._sizes[name] // CHUNK_BYTES)
        found = (int(word) for word in data.split() if word.isdigit() and len(word) < 10)
        return [index for index in found if index < last]

    async def close(self) -> None:
        """Write the records, and end what is being fetched.

        Raises:
            ImageError: A record cannot be written.
        """
        for task in (*self._ahead, *self._fetching.values()):
            task.cancel()
        await asyncio.gather(*self._ahead, *self._fetching.values(), return_exceptions=True)
        with image_errors("write what was read"):
            for name, indices in self._traces.items():
                text = " ".join(map(str, indices)).encode()
                await asyncio.to_thread(self._keep, self._folder / name / "trace", text)


def _read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

"""A file system that shows the shared layers of an origin, and fetches what is read of them.

`python -m hadal.node.images.lazy SOURCE MOUNTPOINT CACHE [BYTES]` serves until it is unmounted or ended
by SIGTERM; SOURCE is a URL or a directory with the files that `SharedLayers` publishes. A store with
`shared=MOUNTPOINT` uses it like any folder. Needs pyfuse3 (`hadal[fuse]`) and /dev/fuse.
"""

import asyncio
import errno
import importlib
import os
import re
import signal
import stat
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from hadal.errors import ImageError
from hadal.node.images.chunks import ChunkCache
from hadal.node.images.origins import DirectoryOrigin, HttpOrigin, Origin
from hadal.node.images.registry import RegistrySettings, Repository

__all__ = ["serve_lazily"]

_NAME = re.compile(r"[0-9a-f]{64}\.(?:meta|blob)")
_FOR_EVER_S = 3600.0


def _make_operations(fuse: Any, cache: ChunkCache) -> object:
    """Return the file system: one folder, whose files are looked up but not listed."""
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}

    class Operations(fuse.Operations):
        async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> object:
            text = os.fsdecode(name)
            if parent_inode != fuse.ROOT_INODE or not _NAME.fullmatch(text):
                raise fuse.FUSEError(errno.ENOENT)
            if text not in numbers:
                if await _or_io_error(cache.size(text)) is None:
                    raise fuse.FUSEError(errno.ENOENT)
                number = numbers.setdefault(text, fuse.ROOT_INODE + 1 + len(numbers))
                names[number] = text
            return await self.getattr(numbers[text])

        async def getattr(self, inode: int, ctx: object = None) -> object:
            entry = fuse.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFDIR | 0o555
            entry.entry_timeout = entry.attr_timeout = _FOR_EVER_S
            if inode != fuse.ROOT_INODE:
                entry.st_mode = stat.S_IFREG | 0o444
                entry.st_size = await _or_io_error(cache.size(names[inode]))
            return entry

        async def opendir(self, inode: int, ctx: object) -> int:
            return inode

        async def readdir(self, fh: int, start_id: int, token: object) -> None:
            return

        async def open(self, inode: int, flags: int, ctx: object) -> object:
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise fuse.FUSEError(errno.EROFS)
            return fuse.FileInfo(fh=inode, keep_cache=True)

        async def read(self, fh: int, off: int, size: int) -> bytes:
            return await _or_io_error(cache.read(names[fh], off, size))

    async def _or_io_error(work: Any) -> Any:
        try:
            return await work
        except ImageError as error:
            sys.stderr.write(f"{error}\n")
            raise fuse.FUSEError(errno.EIO) from error

    return Operations()


async def serve_lazily(
    source: str, mountpoint: Path, cache_folder: Path, *, bytes_max: int = 16 << 30
) -> None:
    """Serve the layers of an origin at a mount point until SIGTERM, SIGINT or an unmount.

    Args:
        source: URL or directory.
        mountpoint: An empty directory.
        cache_folder: For what has been read.
        bytes_max: That it may take.

    Raises:
        ImageError: The origin or the cache cannot be used.
        ModuleNotFoundError: pyfuse3 is not installed.
    """
    fuse = importlib.import_module("pyfuse3")
    importlib.import_module("pyfuse3.asyncio").enable()
    async with AsyncExitStack() as stack:
        settings = RegistrySettings()
        origin: Origin = DirectoryOrigin(Path(source))
        if "://" in source:
            session = await stack.enter_async_context(Repository.open_session(settings))
            origin = HttpOrigin(session, source, settings)
        cache = ChunkCache(cache_folder, origin, bytes_max=bytes_max)
        options = {*fuse.default_options, "fsname=hadal", "ro"}
        fuse.init(_make_operations(fuse, cache), str(mountpoint), options)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, fuse.terminate)
        try:
            await fuse.main()
        finally:
            fuse.close(unmount=True)
            await cache.close()


if __name__ == "__main__":
    _source, _mountpoint, _cache, *_rest = sys.argv[1:]
    _most = {"bytes_max": int(_rest[0])} if _rest else {}
    asyncio.run(serve_lazily(_source, Path(_mountpoint), Path(_cache), **_most))

"""Where the files of shared layers come from, piece by piece: a directory, or a web server."""

import asyncio
import re
from pathlib import Path
from typing import Protocol

import aiohttp

from hadal.errors import ImageError
from hadal.node.images.failures import image_errors
from hadal.node.images.registry import RegistrySettings

__all__ = ["DirectoryOrigin", "HttpOrigin", "Origin"]

_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


class Origin(Protocol):
    """Files that never change."""

    async def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if it is not there.

        Raises:
            ImageError: The origin cannot be asked.
        """
        ...

    async def read(self, name: str, offset: int, length: int) -> bytes:
        """Return a piece of a file, all of it.

        Raises:
            ImageError: It cannot be had.
        """
        ...


class DirectoryOrigin:
    """A directory, as of a mount that is slow.

    Args:
        folder: The directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def size(self, name: str) -> int | None:
        """As `Origin.size`."""

        def look() -> int | None:
            with image_errors("read a shared layer"):
                try:
                    return (self._folder / name).stat().st_size
                except FileNotFoundError:
                    return None

        return await asyncio.to_thread(look)

    async def read(self, name: str, offset: int, length: int) -> bytes:
        """As `Origin.read`."""

        def read() -> bytes:
            with image_errors("read a shared layer"), (self._folder / name).open("rb") as file:
                file.seek(offset)
                return file.read(length)

        return _check_length(await asyncio.to_thread(read), length, name)


class HttpOrigin:
    """A web server, or an object store that speaks like one: GET with Range.

    Args:
        session: To ask with.
        base: URL above the files.
        settings: Attempts, and what may be asked without TLS.

    Raises:
        ImageError: The URL is not reached by TLS and not allowed without.
    """

    def __init__(
        self, session: aiohttp.ClientSession, base: str, settings: RegistrySettings
    ) -> None:
        self._session = session
        self._base = settings.check(base)
        self._settings = settings

    async def size(self, name: str) -> int | None:
        """As `Origin.size`."""
        return (await self._get(name, 0, 1))[0]

    async def read(self, name: str, offset: int, length: int) -> bytes:
        """As `Origin.read`."""
        _, data = await self._get(name, offset, length)
        return _check_length(data, length, name)

    async def _get(self, name: str, offset: int, length: int) -> tuple[int | None, bytes]:
        reason = ""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        for attempt in range(self._settings.attempts):
            if attempt:
                await asyncio.sleep(self._settings.retry_delay_s * 2 ** (attempt - 1))
            try:
                async with self._session.get(
                    self._base / name, headers=headers, allow_redirects=False
                ) as response:
                    total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
                    if response.status == 206 and total is not None:
                        return int(total[1]), await response.content.readexactly(length)
                    if response.status == 404:
                        return None, b""
                    reason = f"status {response.status}, expected 206 (a part)"
            except (aiohttp.ClientError, TimeoutError, OSError, EOFError) as error:
                reason = str(error) or type(error).__name__
        raise ImageError(f"cannot read {name} from {self._base}: {reason}")


def _check_length(data: bytes, length: int, name: str) -> bytes:
    if len(data) != length:
        raise ImageError(f"{name}: {len(data):,} bytes of a piece, expected {length:,}")
    return data

"""Tar archives, compressed or not, into directories; the guest program does the unpacking, confined to them."""

import gzip
import hashlib
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from hadal.errors import ImageError
from hadal.node.guest_program import guest_program
from hadal.node.images.failures import image_errors
from hadal.node.wire import Tag, WireError, decode_fields

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdError, ZstdFile
else:
    from backports.zstd import DecompressionParameter, ZstdError, ZstdFile

__all__ = ["Stopped", "unpack"]

_CHUNK = 1 << 18
_WINDOW_LOG_MAX = 27
"""Memory that a zstd stream may ask for, as a power of two."""
_BLOCK = 512
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


class Stopped(threading.Event):
    """Set to end work in a thread at its next step."""

    def check(self) -> None:
        """Go on, or not.

        Raises:
            ImageError: It is set.
        """
        if self.is_set():
            raise ImageError("stopped")


def unpack(archive: Path, target: Path, *, bytes_max: int, stopped: Stopped | None = None) -> str:
    """Unpack a tar archive, plain, gzip or zstd, as an image layer.

    Args:
        archive: The file. Nothing in it is believed.
        target: An empty directory; on failure what is in it is left to the caller.
        bytes_max: Most bytes after decompression.
        stopped: Ends it early.

    Returns:
        The digest of the archive after decompression.

    Raises:
        ImageError: It is too large, damaged, or has entries that lead out of the directory.
        OSError: It cannot be read.
    """
    sha, size = hashlib.sha256(), 0
    with _decompressed(archive) as stream, _Unpacker(target) as unpacker:
        while data := stream.read(_CHUNK):
            if stopped is not None:
                stopped.check()
            size += len(data)
            if size > bytes_max:
                raise ImageError(f"a layer of more than {bytes_max:,} bytes after decompression")
            sha.update(data)
            if not unpacker.write(data):
                break
        unpacker.write(bytes(-size % _BLOCK))  # umoci leaves the end of the last block away
        unpacker.finish()
    return f"sha256:{sha.hexdigest()}"


@contextmanager
def _decompressed(archive: Path) -> Generator[IO[bytes]]:
    with image_errors("read an archive"):
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would wait for ever
        file = os.fdopen(os.open(archive, flags), "rb")
    with file:
        start = file.read(4)
        file.seek(0)
        try:
            if start.startswith(_GZIP):
                with gzip.GzipFile(fileobj=file) as stream:
                    yield cast("IO[bytes]", stream)
            elif start == _ZSTD:
                options: dict[int, int] = {DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
                with ZstdFile(file, options=options) as stream:
                    yield cast("IO[bytes]", stream)
            else:
                yield file
        except (gzip.BadGzipFile, EOFError, zlib.error, ZstdError) as error:
            raise ImageError(f"an archive that is damaged: {error}") from error


class _Unpacker:
    """The guest program at work."""

    def __init__(self, target: Path) -> None:
        self._process = subprocess.Popen(
            [guest_program(), "unpack", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
        )

    def __enter__(self) -> "_Unpacker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()

    def write(self, data: bytes) -> bool:
        """Pass on a part; False if it has ended and takes no more."""
        try:
            cast("BinaryIO", self._process.stdin).write(data)
        except BrokenPipeError:
            return False
        return True

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            ImageError: It has refused the archive.
        """
        try:
            _, message = self._process.communicate()
        except BrokenPipeError:
            message = b""
        if self._process.returncode == 0:
            return
        try:
            fields = decode_fields(message[:8192])
        except WireError:
            fields = {}
        number = int.from_bytes(fields.get(Tag.ERRNO, b""), "little")
        what = fields.get(Tag.TEXT, b"?")[-200:].decode(errors="replace")
        reason = os.strerror(number) if number else f"status {self._process.returncode}"
        with image_errors("unpack a layer"):
            raise OSError(number, reason, what)

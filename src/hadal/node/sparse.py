"""What of a file is no hole."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["copy_data", "copy_file", "copy_not_zero", "data_of", "not_zero", "put_not_zero"]

_PART = 1 << 20
_BLOCK = 4096
_ZEROS = bytes(_BLOCK)


def data_of(file: int, size: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield first and last offset of every part of a file that is no hole.

    Where a file system knows no holes, that is all of it.

    Args:
        file: A descriptor of it.
        size: How much of it counts. Default: all.

    Raises:
        OSError: It cannot be read.
    """
    at, end = 0, os.fstat(file).st_size if size is None else size
    while at < end:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
            at = min(os.lseek(file, start, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole is left, or the file has shrunk
        if start < at:
            yield start, at


def copy_data(source: int, target: int) -> None:
    """Copy what is no hole of one file over the same places of another, in memory or on a disk.

    Raises:
        OSError: It cannot be read or written.
    """
    for start, end in data_of(source):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if sent == 0:
                return  # it has shrunk
            start += sent


def not_zero(file: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of every run of blocks that are not all zeros, up to 1 MiB of each.

    They are the same for the same content, whether its zeros are holes or not: file systems may change that.

    Args:
        file: A descriptor of it.

    Raises:
        OSError: It cannot be read.
    """
    at = 0
    for start, end in data_of(file):
        at = max(at, start - start % _PART)
        while at < end:
            data = os.pread(file, _PART, at)
            for first, last in _not_zero(data):
                yield at + first, data[first:last]
            at += _PART


def copy_not_zero(source: int, target: int) -> None:
    """Copy a file into an empty one; what is zero becomes a hole.

    Raises:
        OSError: It cannot be read or written.
    """
    os.ftruncate(target, os.fstat(source).st_size)
    for at, data in not_zero(source):
        os.pwrite(target, data, at)


def put_not_zero(target: int, at: int, data: bytes) -> None:
    """Write over a part of a file; what is zero, and was, stays a hole.

    Raises:
        OSError: It cannot be read or written.
    """
    written = 0
    for first, last in [*_not_zero(data), (len(data), len(data))]:
        if os.pread(target, first - written, at + written).strip(b"\0"):
            os.pwrite(target, bytes(first - written), at + written)
        os.pwrite(target, data[first:last], at + first)
        written = last


def _not_zero(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield first and last offset of every run of blocks that are not all zeros."""
    begun: int | None = None
    for at in range(0, len(data), _BLOCK):
        if data[at : at + _BLOCK] == _ZEROS[: len(data) - at]:
            if begun is not None:
                yield begun, at
            begun = None
        elif begun is None:
            begun = at
    if begun is not None:
        yield begun, len(data)


def copy_file(source: int, target: Path) -> None:
    """Copy a file with its holes into a new one; file systems that can share the content do.

    Args:
        source: A descriptor of it.
        target: Of the new one.

    Raises:
        OSError: It cannot be read or written.
    """
    with target.open("xb") as new:
        os.ftruncate(new.fileno(), os.fstat(source).st_size)
        for start, end in data_of(source):
            while start < end:
                start += os.copy_file_range(source, new.fileno(), end - start, start, start)

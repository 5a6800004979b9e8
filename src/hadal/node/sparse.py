"""What of a file is no hole."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["copy_data", "copy_file", "data_of"]

_PART = 1 << 20


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
        for at in range(start, end, _PART):
            os.pwrite(target, os.pread(source, min(_PART, end - at), at), at)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file with its holes into a new one; file systems that can share the content do.

    Raises:
        OSError: It cannot be read or written.
    """
    with source.open("rb") as old, target.open("xb") as new:
        os.ftruncate(new.fileno(), os.fstat(old.fileno()).st_size)
        for start, end in data_of(old.fileno()):
            while start < end:
                start += os.copy_file_range(old.fileno(), new.fileno(), end - start, start, start)

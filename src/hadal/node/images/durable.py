"""Waiting until what has been written is on the disk."""

import ctypes
import os
from pathlib import Path

__all__ = ["sync_filesystem", "sync_path"]

_LIBC = ctypes.CDLL(None, use_errno=True)


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk.

    Raises:
        OSError: They cannot be written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(path: Path) -> None:
    """Write out all that is pending of the file system that a path lies on.

    Raises:
        OSError: As syncfs(2): earlier writes did not reach the disk.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)

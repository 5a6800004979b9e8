"""Files in a folder that QEMU writes: what breaks out of a machine may put there what it likes, links above all."""

import contextlib
import os
import stat
from collections.abc import Callable, Generator
from pathlib import Path

from hadal.errors import NodeError

__all__ = ["open_file", "socket_path"]


def open_file(path: Path) -> int:
    """Return a descriptor for reading a file that QEMU has written, and nothing that it leads to.

    Raises:
        NodeError: It is not there, or it is something else.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return _opened(path, flags, stat.S_ISREG, "file")


@contextlib.contextmanager
def socket_path(path: Path) -> Generator[str]:
    """Yield a path by which a socket that QEMU listens at is reached, and nothing that it leads to.

    Raises:
        FileNotFoundError: It is not there yet.
        NodeError: It is something else.
    """
    socket = _opened(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, stat.S_ISSOCK, "socket")
    try:
        yield f"/proc/self/fd/{socket}"
    finally:
        os.close(socket)


def _opened(path: Path, flags: int, is_kind: Callable[[int], bool], kind: str) -> int:
    try:
        file = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NodeError(f"{path} of a machine is no {kind}: {error.strerror}") from error
    if not is_kind(os.fstat(file).st_mode):
        os.close(file)
        raise NodeError(f"{path} of a machine is no {kind}")
    return file

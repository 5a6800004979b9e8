"""Network namespaces: making, entering and keeping them."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Generator
from pathlib import Path

__all__ = ["current", "enter", "enter_mounts", "entered", "keep", "new_namespace", "release"]

_CLONE_NEWNET, _CLONE_NEWNS, _CLONE_FS = 0x40000000, 0x20000, 0x200
_MS_BIND, _MNT_DETACH = 4096, 2
_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def current() -> int:
    """Return a file descriptor of the calling thread's network namespace."""
    # /proc/self is the main thread; a namespace is each thread's own.
    return os.open(
        f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC
    )


def enter(namespace: int) -> None:
    """Move the calling thread into a network namespace.

    Args:
        namespace: File descriptor.

    Raises:
        OSError: Not allowed.
    """
    _check(_LIBC.setns(namespace, _CLONE_NEWNET), "enter network namespace")


def enter_mounts(namespace: int) -> None:
    """Move the calling thread into a mount namespace, so that what it keeps outlives this process.

    Args:
        namespace: File descriptor.

    Raises:
        OSError: Not allowed.
    """
    _check(_LIBC.unshare(_CLONE_FS), "give a thread its own directory")
    _check(_LIBC.setns(namespace, _CLONE_NEWNS), "enter mount namespace")


@contextlib.contextmanager
def entered(namespace: int) -> Generator[None]:
    """Run a block in a network namespace; no `await` inside.

    Raises:
        OSError: Not allowed.
    """
    home = current()
    try:
        enter(namespace)
        try:
            yield
        finally:
            enter(home)
    finally:
        os.close(home)


@contextlib.contextmanager
def new_namespace() -> Generator[int]:
    """Run a block in a new network namespace, with loopback only and down.

    Yields:
        Its file descriptor, which outlives the block unless the block fails.

    Raises:
        OSError: Not allowed, or no room for another.
    """
    home = current()
    try:
        _check(_LIBC.unshare(_CLONE_NEWNET), "make network namespace")
        try:
            namespace = current()
            try:
                yield namespace
            except BaseException:
                os.close(namespace)
                raise
        finally:
            enter(home)
    finally:
        os.close(home)


def keep(namespace: int, path: Path) -> None:
    """Keep a namespace when nothing of this process is left, at a path.

    Raises:
        OSError: The path cannot be mounted on.
    """
    path.touch(mode=0o600)
    source = f"/proc/self/fd/{namespace}".encode()
    _check(_LIBC.mount(source, os.fsencode(path), None, _MS_BIND, None), f"mount on {path}")


def release(path: Path) -> None:
    """Let go of a kept namespace; nothing happens where there is none."""
    _LIBC.umount2(os.fsencode(path), _MNT_DETACH)
    path.unlink(missing_ok=True)

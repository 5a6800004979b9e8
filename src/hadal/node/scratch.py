"""What boxes write: a disk of its own for each, so that its size and its files are limited by the kernel.

A disk is a sparse file with an ext4 file system, behind a loop device. The file has no name from the start
and the device goes with its last user: when a box ends, however it ends, the kernel frees all of it, and
no tree has to be removed. Only the box's own mount namespace has it mounted; who needs to look at it from
outside mounts the same device for a moment.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import NodeError, UnsupportedError
from hadal.node.sparse import data_of

__all__ = ["Disk", "DiskPool", "Disks"]

_libc = ctypes.CDLL(None, use_errno=True)
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same numbers on every architecture
_SET_STRING, _CREATE = 1, 6
_CLOEXEC = 1
_NODEV, _NOATIME = 4, 0x10
_LOOP_CONFIGURE, _LOOP_GET_FREE = 0x4C0A, 0x4C82
_AUTOCLEAR, _DIRECT_IO = 4, 16
_BLOCK = 4096
_INODE_BYTES = 256


@dataclass(frozen=True)
class Disk:
    """A disk: a mount for its box, to be closed when the box has it, and the number of its device."""

    descriptor: int
    device: int


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(device: int) -> int:
    """Return a mount of a device that is attached nowhere."""
    context = _check(_libc.syscall(_FSOPEN, b"ext4", _CLOEXEC), "fsopen")
    try:
        source = f"/dev/loop{device}".encode()
        for key, value in ((b"source", source), (b"discard", None)):
            kind = _SET_STRING if value is not None else 0  # 0: a flag
            _check(_libc.syscall(_FSCONFIG, context, kind, key, value, 0), "fsconfig")
        _check(_libc.syscall(_FSCONFIG, context, _CREATE, None, None, 0), "mount ext4")
        return _check(_libc.syscall(_FSMOUNT, context, _CLOEXEC, _NODEV | _NOATIME), "fsmount")
    finally:
        os.close(context)


class Disks:
    """Makes disks.

    Args:
        folder: Where their files lie: on the disk that is to be shared out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._templates: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, size: int, inodes: int) -> Disk:
        """Make a disk; takes some milliseconds, most of them asleep.

        Args:
            size: Bytes that can be written.
            inodes: Files that can be made.

        Raises:
            UnsupportedError: This host has no loop devices or no ext4.
            NodeError: The disk is full.
        """
        try:
            file = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                self.format(file, size, inodes)
                return self._attach(file)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise UnsupportedError(
                f"no disks for boxes: {error}", hint="install e2fsprogs; load the loop module"
            ) from error
        except OSError as error:
            raise NodeError(f"cannot make a disk of {size:,} bytes: {error.strerror}") from error

    def format(self, file: int, size: int, inodes: int) -> None:
        """Make an empty file the file of a disk.

        Args:
            file: A descriptor of it.
            size: Bytes that can be written.
            inodes: Files that can be made.

        Raises:
            OSError: It cannot be written, or no file system can be made.
        """
        size += inodes * _INODE_BYTES + size // 256 + (1 << 19)  # what it needs for itself
        size -= size % _BLOCK
        template = self._template(size, inodes)
        os.ftruncate(file, size)
        for offset, data in template:
            os.pwrite(file, data, offset)

    def _attach(self, file: int) -> Disk:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                device = fcntl.ioctl(control, _LOOP_GET_FREE)
                loop = os.open(f"/dev/loop{device}", os.O_RDWR | os.O_CLOEXEC)
                info = bytearray(232)
                struct.pack_into("<I", info, 52, _AUTOCLEAR | _DIRECT_IO)
                try:
                    fcntl.ioctl(
                        loop, _LOOP_CONFIGURE, struct.pack("<II", file, _BLOCK) + info + bytes(64)
                    )
                    return Disk(_mount(device), device)
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno != 16:  # EBUSY: another process was faster
                        raise
                finally:
                    os.close(loop)
        finally:
            os.close(control)

    def _template(self, size: int, inodes: int) -> list[tuple[int, bytes]]:
        """Return what an empty file system of this size has in its file: little, at a few places."""
        with self._lock:  # several threads may want the same one first
            if (size, inodes) not in self._templates:
                self._templates[size, inodes] = self._format(size, inodes)
        return self._templates[size, inodes]

    def _format(self, size: int, inodes: int) -> list[tuple[int, bytes]]:
        path = self._folder / f"template-{os.getpid()}"
        try:
            with path.open("wb") as file:
                file.truncate(size)
            options = "lazy_itable_init=1,nodiscard"
            made = subprocess.run(
                ["mkfs.ext4", "-q", "-F", "-O", "^has_journal,^resize_inode", "-E", options, "-m",
                 "0", "-b", str(_BLOCK), "-N", str(inodes), path],
                capture_output=True, text=True, check=False,
                env={"PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"},
            )  # fmt: skip
            if made.returncode:
                raise UnsupportedError(f"mkfs.ext4 failed: {made.stderr.strip()}")
            with path.open("rb") as file:
                return [(a, os.pread(file.fileno(), b - a, a)) for a, b in data_of(file.fileno())]
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def open(self, device: int) -> Generator[Path]:
        """Give a look at the disk of a box that lives.

        Raises:
            NodeError: It is not there any more.
        """
        try:
            descriptor = _mount(device)
        except OSError as error:
            raise NodeError(f"the disk of a box is not there: {error.strerror}") from error
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def used_bytes(self, device: int) -> int:
        """Return what is written on a disk."""
        with self.open(device) as root:
            found = os.statvfs(root)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


class DiskPool:
    """Disks of the size that was asked for last, made before they are needed.

    Args:
        disks: Makes them.
        spare: How many are kept.
    """

    def __init__(self, disks: Disks, spare: int = 2) -> None:
        self._disks = disks
        self._spare = spare
        self._size: tuple[int, int] | None = None
        self._ready: list[asyncio.Task[Disk]] = []

    async def take(self, size: int, inodes: int) -> Disk:
        """Return a disk, as `Disks.make`, with its errors."""
        if self._size != (size, inodes):
            self.close()
            self._size = (size, inodes)
            return await self._make()
        task = self._ready.pop(0) if self._ready else None
        while len(self._ready) < self._spare:
            self._ready.append(asyncio.get_running_loop().create_task(self._make()))
        if task is None:
            return await self._make()
        return await task

    async def _make(self) -> Disk:
        assert self._size is not None
        return await asyncio.to_thread(self._disks.make, *self._size)

    def close(self) -> None:
        """Let go of the ready ones."""
        for task in self._ready:
            task.add_done_callback(_discard)
        self._ready = []


def _discard(task: "asyncio.Task[Disk]") -> None:
    if not task.cancelled() and task.exception() is None:
        os.close(task.result().descriptor)

"""Files out of a box, from the tar stream that its guest writes. Who writes it is not trusted.

Python's own extraction looks at paths before it uses them, and has been led astray in between
(CVE-2025-4517). Here nothing is resolved: every directory is opened from the one above it, links are never
followed, and what would lead out of the target is refused.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hadal.errors import UnsafeFileError

__all__ = ["extract"]

_BLOCK = 512
_CHUNK = 1 << 20
_NAME_MAX = 4096
_TIME_MAX = 8_000_000_000
"""Seconds since 1970 that nanoseconds have room for."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {b"3": "a device", b"4": "a device", b"6": "a FIFO"}
Parts = tuple[bytes, ...]


def extract(archive: BinaryIO, target: Path) -> None:
    """Extract an archive into a directory that exists; what is there of its files is replaced.

    Modes are kept as far as they harm nobody, times are, owners are not.

    Raises:
        UnsafeFileError: It has something else than files, directories and links that stay inside, or is
            cut off. What came before is left.
        OSError: The system of this machine says no.
    """
    top = os.open(target, _DIRECTORY & ~os.O_NOFOLLOW)
    extraction = _Extraction(archive, top)
    try:
        for entry in _entries(archive):
            extraction.take(entry)
        extraction.finish()
    finally:
        extraction.close()
        os.close(top)


@dataclass(frozen=True)
class _Entry:
    kind: bytes
    name: bytes
    link: bytes
    mode: int
    size: int
    seconds: int


def _entries(archive: BinaryIO) -> Iterator[_Entry]:
    """Yield what headers say. Whoever takes an entry of a file reads its content before the next one."""
    long: dict[bytes, bytes] = {}
    while True:
        block = _read(archive, _BLOCK)
        if not block.strip(b"\0"):
            return
        if sum(block) - sum(block[148:156]) + 8 * 32 != _number(block[148:156]):
            raise UnsafeFileError(
                "the archive from the box is damaged: a header without its checksum"
            )
        kind, size = block[156:157].replace(b"\0", b"0"), _number(block[124:136])
        if kind in (b"L", b"K"):  # GNU: the name or target of the next entry
            if size > _NAME_MAX:
                raise UnsafeFileError(
                    f"a name of {size} bytes", hint=f"at most {_NAME_MAX} are taken"
                )
            long[kind] = _read(archive, size + -size % _BLOCK)[:size].partition(b"\0")[0]
            continue
        name, link = (block[at : at + 100].partition(b"\0")[0] for at in (0, 157))
        yield _Entry(
            kind=kind, name=long.get(b"L", name), link=long.get(b"K", link), size=size,
            mode=_number(block[100:108]), seconds=min(_number(block[136:148]), _TIME_MAX),
        )  # fmt: skip
        long = {}


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256; the next bit would be a sign
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or set(digits) & set(b"89"):
        raise UnsafeFileError(f"the archive from the box is damaged: {field!r} is no number")
    return int(digits, 8)


def _times(seconds: int) -> tuple[int, int]:
    return seconds * 10**9, seconds * 10**9


def _read(archive: BinaryIO, size: int) -> bytes:
    data = archive.read(size)
    if len(data) < size:
        raise UnsafeFileError("the archive from the box is cut off")
    return data


def _parts(name: bytes, what: str) -> Parts:
    """Take a name apart; one that is absolute or goes up is refused."""
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if name.startswith(b"/") or b".." in parts:
        raise _unsafe(name, f"{what} leads out of the directory")
    return parts


def _unsafe(name: bytes, why: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{os.fsdecode(name)[:200]!r} is not taken out of the box: {why}",
        hint="fetch files one by one, or all of it as a tar stream, unopened",
    )


class _Extraction:
    """One archive on its way into one directory."""

    def __init__(self, archive: BinaryIO, top: int) -> None:
        self._archive = archive
        self._folder: tuple[Parts, int] = ((), os.dup(top))
        self._top = top
        self._times: list[tuple[Parts, int]] = []

    def close(self) -> None:
        """Let go of what is open."""
        os.close(self._folder[1])

    def take(self, entry: _Entry) -> None:
        """Make what an entry says."""
        parts = _parts(entry.name, "its name")
        if entry.kind == b"5":
            self._enter(entry.name, parts)
            self._times.append((parts, entry.seconds))
            return
        if not parts:
            raise _unsafe(entry.name, "it has no name")
        folder, name = self._enter(entry.name, parts[:-1]), parts[-1]
        if entry.kind in _KINDS:
            raise _unsafe(entry.name, f"it is {_KINDS[entry.kind]}")
        if entry.kind == b"0":
            self._replace(folder, name)
            self._write(folder, name, entry)
        elif entry.kind == b"2":
            _check_target(entry, len(parts) - 1)
            self._replace(folder, name)
            os.symlink(entry.link, name, dir_fd=folder)
            self._set_time(name, entry.seconds, folder)
        elif entry.kind == b"1":
            self._link(entry, parts)
        else:
            raise _unsafe(entry.name, f"it is of an unknown kind, {entry.kind!r}")

    def finish(self) -> None:
        """Set the times of directories, which is worth something only when all is in them."""
        for parts, seconds in reversed(self._times):
            os.utime(self._enter(b"/".join(parts), parts), ns=_times(seconds))

    def _enter(self, name: bytes, parts: Parts) -> int:
        """Return a directory, made where it is missing. It stays open until the next one is entered."""
        if self._folder[0] == parts:
            return self._folder[1]
        here = os.dup(self._top)
        try:
            for part in parts:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=here)
                below = os.open(part, _DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
        except OSError as error:
            os.close(here)
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _unsafe(name, "what lies above it is no directory") from error
            raise
        os.close(self._folder[1])
        self._folder = (parts, here)
        return here

    def _replace(self, folder: int, name: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def _write(self, folder: int, name: bytes, entry: _Entry) -> None:
        file = os.open(name, _NEW_FILE, 0o600, dir_fd=folder)
        try:
            left = entry.size
            while left:
                part = _read(self._archive, min(_CHUNK, left))
                left -= len(part)
                while part:
                    part = part[os.write(file, part) :]
            _read(self._archive, -entry.size % _BLOCK)
            mode = entry.mode & 0o755 | 0o600
            os.fchmod(file, mode if mode & 0o100 else mode & ~0o111)
            os.utime(file, ns=_times(entry.seconds))
        finally:
            os.close(file)

    def _link(self, entry: _Entry, parts: Parts) -> None:
        """Make a hard link to a file inside. Not to a link: elsewhere it would lead elsewhere."""
        source = _parts(entry.link, "the file that it is a link to")
        if not source:
            raise _unsafe(entry.name, "it is a link to no file")
        above = os.dup(self._enter(entry.link, source[:-1]))
        try:
            status = os.stat(source[-1], dir_fd=above, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise _unsafe(entry.name, "it is a link to no file")
            folder = self._enter(entry.name, parts[:-1])
            if source != parts:
                self._replace(folder, parts[-1])
                os.link(
                    source[-1],
                    parts[-1],
                    src_dir_fd=above,
                    dst_dir_fd=folder,
                    follow_symlinks=False,
                )
        except FileNotFoundError as error:
            raise _unsafe(entry.name, "it is a link to no file") from error
        finally:
            os.close(above)

    @staticmethod
    def _set_time(name: bytes, seconds: int, folder: int) -> None:
        os.utime(name, ns=_times(seconds), dir_fd=folder, follow_symlinks=False)


def _check_target(entry: _Entry, depth: int) -> None:
    """Refuse a symbolic link that leads out, now or by way of other links.

    One that first goes up, at most to the target, and then only down, ends inside, since all that it can
    come by on its way down are directories and links that do the same.
    """
    parts = [part for part in entry.link.split(b"/") if part not in (b"", b".")]
    up = next((n for n, part in enumerate(parts) if part != b".."), len(parts))
    if entry.link.startswith(b"/") or up > depth or b".." in parts[up:] or not entry.link:
        raise _unsafe(entry.name, f"it is a link to {os.fsdecode(entry.link)[:200]!r}")

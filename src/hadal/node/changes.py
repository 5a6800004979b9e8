"""What a box has changed against its image: read from its overlay's upper directory.

The box goes on meanwhile, and is not trusted: nothing is opened by a path that it could lead elsewhere, no
link is followed, and what it costs depends on what the box has written, not on what sizes it claims.
"""

import errno
import hashlib
import os
import stat
from pathlib import Path

from hadal.errors import SandboxFileError
from hadal.node.sparse import data_of
from hadal.sandbox.results import Change

__all__ = ["list_changes"]

_CHUNK = 1 << 20
_BLOCK = 4096
_ZEROS_MAX = 2 << 30
"""Bytes of holes that are digested for one list, some two seconds: a terabyte of them would take an hour."""
_DEPTH_MAX = 2048
"""More than any path has room for; each level is an open file."""
_OPAQUE = "trusted.overlay.opaque"
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHANGED = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
"""What becomes of an open file's name that means something else by now."""


def list_changes(upper: Path, *, content: bool = True, limit: int | None = None) -> list[Change]:
    """Return every path that was written, removed or replaced, sorted; content by its digest.

    Args:
        upper: The directory.
        content: Whether to read files, for their digests.
        limit: More paths than that are an error.

    Raises:
        SandboxFileError: Directories are nested deeper than paths go, or there are more changes than `limit`.
    """
    found: list[Change] = []
    digests = _Digests() if content else None
    top = os.open(upper, _OPEN | os.O_DIRECTORY)
    folders = [(top, "", _names(top))]
    try:
        while folders:
            folder, prefix, names = folders[-1]
            if not names:
                os.close(folders.pop()[0])
                continue
            name = names.pop()
            path = f"{prefix}/{name}"
            if len(found) == limit:
                raise SandboxFileError(
                    errno.EOVERFLOW, "/", hint=f"more than {limit:,} paths differ from the image"
                )
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    if len(folders) == _DEPTH_MAX:
                        raise SandboxFileError(errno.ENAMETOOLONG, f"{path[:80]}…")
                    below = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=folder)
                    folders.append((below, path, _names(below)))
                    found.append(_change(path, status, replaced=_OPAQUE in os.listxattr(below)))
                else:
                    digest = digests.of(folder, name, status) if digests else None
                    found.append(_change(path, status, digest=digest))
            except OSError as error:
                if isinstance(error, SandboxFileError) or error.errno not in _CHANGED:
                    raise
    finally:
        for folder, _, _ in folders:
            os.close(folder)
    return sorted(found, key=lambda change: change.path)


def _names(folder: int) -> list[str]:
    return sorted(os.listdir(folder), reverse=True)


def _change(
    path: str, status: os.stat_result, *, digest: str | None = None, replaced: bool = False
) -> Change:
    kind = stat.S_IFMT(status.st_mode)
    removed = kind == stat.S_IFCHR and status.st_rdev == 0
    return Change(
        path=path,
        kind="removed" if removed else "replaced" if replaced else "written",
        directory=kind == stat.S_IFDIR,
        mode=stat.S_IMODE(status.st_mode),
        size=status.st_size if kind == stat.S_IFREG else 0,
        digest=digest,
        changed_ns=status.st_ctime_ns,
    )


class _Digests:
    """The digests of one list: of files as they are, holes too, until too many bytes were holes."""

    def __init__(self) -> None:
        self._zeros_left = _ZEROS_MAX

    def of(self, folder: int, name: str, status: os.stat_result) -> str | None:
        """Return the digest of a file or link; None for what has no content."""
        if stat.S_ISLNK(status.st_mode):
            return hashlib.sha256(os.fsencode(os.readlink(name, dir_fd=folder))).hexdigest()
        if not stat.S_ISREG(status.st_mode):
            return None
        file = os.open(name, _OPEN, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            return self._content(file, status.st_size)
        finally:
            os.close(file)

    def _content(self, file: int, size: int) -> str:
        zeros = size - sum(end - start for start, end in data_of(file, size))
        if zeros > self._zeros_left:
            return f"sparse:{_sparse(file, size)}"
        self._zeros_left -= zeros
        return _plain(file, size)


def _read(file: int, start: int, end: int) -> bytes:
    """Return content; what has been cut off meanwhile is zeros, as in a hole."""
    data = os.pread(file, end - start, start)
    return data.ljust(end - start, b"\0")


def _plain(file: int, size: int) -> str:
    sha, at, zeros = hashlib.sha256(), 0, bytes(_CHUNK)
    for start, end in (*data_of(file, size), (size, size)):
        while at < start:
            sha.update(memoryview(zeros)[: start - at])
            at += min(_CHUNK, start - at)
        while at < end:
            part = _read(file, at, min(at + _CHUNK, end))
            sha.update(part)
            at += len(part)
    return sha.hexdigest()


def _sparse(file: int, size: int) -> str:
    """Digest the size, and each block that is not all zeros with its offset.

    Equal content has equal digests, whichever of its zeros are holes.
    """
    sha, at = hashlib.sha256(b"%d\n" % size), 0
    for start, end in data_of(file, size):
        at = max(at, start - start % _BLOCK)
        while at < end:
            part = _read(file, at, at + _CHUNK)
            for offset in range(0, min(_CHUNK, end - at), _BLOCK):
                block = part[offset : offset + _BLOCK]
                if block.strip(b"\0"):
                    sha.update((at + offset).to_bytes(8, "little") + block)
            at += min(_CHUNK, -(-(end - at) // _BLOCK) * _BLOCK)
    return sha.hexdigest()

"""Directories copied with everything that a root file system is made of, and their digest.

The digest is over a canonical list of what is copied, so it is that of the copy even if the source
changes meanwhile. docs/formats/image-store.md specifies the list. The source may belong to a box that is
running: no link in it is followed, and nothing but regular files is read.
"""

import errno
import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.images.failures import image_errors

__all__ = ["CopiedTree", "copy_tree", "remove_tree"]

_CHUNK = 1 << 20
_DEPTH_MAX = 256
_DEPTH_REMOVED = 12  # of the longest names still fits a path
_OPAQUE = "trusted.overlay.opaque"
_OVERLAY = "trusted.overlay."
_KEPT = ("user.", "trusted.", "security.capability", "system.posix_acl_")


@dataclass(frozen=True)
class CopiedTree:
    """What a copy came to: its digest, bytes of file content, and number of entries."""

    digest: str
    size: int
    entries: int


class _Copy:
    """A copy that is being made."""

    def __init__(
        self, target: Path, bytes_max: int | None, upper: bool, owner: tuple[int, int] | None
    ) -> None:
        self.target = target
        self.bytes_max = bytes_max
        self.upper = upper
        self.owner = owner
        self.sha = hashlib.sha256(b"hadal tree 1\n")
        self.size = 0
        self.entries = 0
        self.linked: dict[tuple[int, int], bytes] = {}

    def add(self, path: bytes, kind: bytes, status: os.stat_result, what: bytes) -> None:
        """Put an entry into the digest."""
        user, group = self.owner or (status.st_uid, status.st_gid)
        numbers = (stat.S_IMODE(status.st_mode), user, group, status.st_mtime_ns)
        self.put(path, kind, *(b"%d" % number for number in numbers), what)
        self.entries += 1

    def put(self, *fields: bytes) -> None:
        """Put fields into the digest, each with its length."""
        self.sha.update(b"%d," % len(fields))
        for text in fields:
            self.sha.update(b"%d:" % len(text) + text)


def copy_tree(
    source: Path,
    target: Path,
    *,
    upper: bool = False,
    owner: tuple[int, int] | None = None,
    bytes_max: int | None = None,
) -> CopiedTree:
    """Copy a directory into a new one: owners, modes, times, links, devices, attributes.

    Sockets are left out, and so are attributes that only mean something on this host.

    Args:
        source: A directory.
        target: To be made; on failure what is there of it is left to the caller.
        upper: The source is the upper directory of an overlay: its whiteouts and opaque directories are
            kept, what else overlayfs notes is not.
        owner: User and group of everything in the copy; None: as in the source.
        bytes_max: Most bytes of content; None for no limit.

    Raises:
        ImageError: It is not there, too large or too deep, or uses redirects of overlayfs.
        OSError: Something in it cannot be read, or the copy not be written.
    """
    copy = _Copy(target, bytes_max, upper, owner)
    with image_errors("read a directory"):
        fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _copy_directory(copy, fd, b"", 0)
    finally:
        os.close(fd)
    return CopiedTree(f"sha256:{copy.sha.hexdigest()}", copy.size, copy.entries)


def _copy_directory(copy: _Copy, fd: int, path: bytes, depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise ImageError(
            f"directories nest more than {_DEPTH_MAX} deep: …/{os.fsdecode(path[-80:])}"
        )
    status = os.fstat(fd)
    made = _inside(copy.target, path)
    made.mkdir(mode=0o700)
    attributes = _read_attributes(copy, fd, path)
    copy.add(path, b"directory", status, b"")
    for name in sorted(os.fsencode(entry) for entry in os.listdir(fd)):
        _copy_entry(copy, fd, name, path + b"/" + name if path else name, depth)
    _apply(copy, made, status, attributes)


def _copy_entry(copy: _Copy, parent: int, name: bytes, path: bytes, depth: int) -> None:
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:  # a running box has removed it
        return
    kind = stat.S_IFMT(status.st_mode)
    made = _inside(copy.target, path)
    if kind in (stat.S_IFDIR, stat.S_IFREG):
        directory = os.O_DIRECTORY if kind == stat.S_IFDIR else 0
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | directory
        try:
            fd = os.open(name, flags, dir_fd=parent)
        except FileNotFoundError:
            return
        try:
            if directory:
                _copy_directory(copy, fd, path, depth + 1)
            else:
                _copy_file(copy, fd, path, made)
        finally:
            os.close(fd)
        return
    if kind == stat.S_IFSOCK:
        return
    whiteout = kind == stat.S_IFCHR and status.st_rdev == 0
    if whiteout:  # of no owner, mode and time
        os.mknod(made, stat.S_IFCHR)
        os.utime(made, ns=(0, 0))
        copy.put(path, b"whiteout")
        copy.entries += 1
        return
    attributes = _read_attributes(copy, Path(f"/proc/self/fd/{parent}", os.fsdecode(name)), path)
    if kind == stat.S_IFLNK:
        target = os.readlink(name, dir_fd=parent)
        made.symlink_to(os.fsdecode(target))
        copy.add(path, b"symlink", status, target)
    else:
        os.mknod(made, kind | 0o600, status.st_rdev)
        number = b"%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev))
        copy.add(path, _KINDS[kind], status, number)
    _apply(copy, made, status, attributes)


_KINDS = {stat.S_IFCHR: b"character", stat.S_IFBLK: b"block", stat.S_IFIFO: b"fifo"}


def _copy_file(copy: _Copy, fd: int, path: bytes, made: Path) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):  # exchanged since it was looked at
        raise ImageError(f"{os.fsdecode(path)!r:.200} changes while it is copied")
    identity = (status.st_dev, status.st_ino)
    if status.st_nlink > 1 and (first := copy.linked.get(identity)) is not None:
        os.link(_inside(copy.target, first), made)
        copy.put(path, b"hardlink", first)
        copy.entries += 1
        return
    copy.linked[identity] = path
    attributes = _read_attributes(copy, fd, path)
    sha = hashlib.sha256()
    with made.open("xb", buffering=0) as file:
        while data := os.read(fd, _CHUNK):
            copy.size += len(data)
            if copy.bytes_max is not None and copy.size > copy.bytes_max:
                raise ImageError(
                    f"more than {copy.bytes_max:,} bytes of content, at {os.fsdecode(path)!r:.200}"
                )
            sha.update(data)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        size = file.tell()
    copy.add(path, b"file", status, b"%d:%s" % (size, sha.hexdigest().encode()))
    _apply(copy, made, status, attributes)


def _read_attributes(copy: _Copy, of: int | Path, path: bytes) -> dict[str, bytes]:
    """Return the extended attributes that go into the copy, and put them into the digest."""
    follow = isinstance(of, int)
    kept: dict[str, bytes] = {}
    try:
        names = sorted(os.listxattr(of, follow_symlinks=follow))
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return kept
        raise
    for name in names:
        if name in ("trusted.overlay.redirect", "trusted.overlay.metacopy") and copy.upper:
            raise ImageError(
                f"{os.fsdecode(path)!r:.200} refers to a lower layer ({name})",
                hint="mount the overlay with redirect_dir=off,metacopy=off",
            )
        if not name.startswith(_KEPT) or (name.startswith(_OVERLAY) and name != _OPAQUE):
            continue
        try:
            value = os.getxattr(of, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.ENODATA:  # it has just gone
                continue
            raise
        if name == _OPAQUE and (not copy.upper or value != b"y"):
            continue
        kept[name] = value
        copy.put(path, b"attribute", name.encode(), value)
    return kept


def _apply(copy: _Copy, made: Path, status: os.stat_result, attributes: dict[str, bytes]) -> None:
    os.chown(made, *(copy.owner or (status.st_uid, status.st_gid)), follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        made.chmod(stat.S_IMODE(status.st_mode))  # after the owner, who takes setuid away
    for name, value in attributes.items():
        os.setxattr(made, name, value, follow_symlinks=False)
    times = (status.st_mtime_ns, status.st_mtime_ns)
    os.utime(made, ns=times, follow_symlinks=False)


def _inside(target: Path, path: bytes) -> Path:
    return Path(target, os.fsdecode(path))


def remove_tree(folder: Path) -> None:
    """Remove a directory and all that is in it, however deep.

    Raises:
        OSError: Something cannot be removed.
    """
    deep = [folder]
    while deep:
        directory = deep.pop()
        _empty(directory, folder, deep, 0)
        if directory != folder:
            directory.rmdir()
    folder.rmdir()


def _empty(directory: Path, top: Path, deep: list[Path], depth: int) -> None:
    """Remove what is in a directory; what lies too deep for a path or a stack is moved to the top."""
    with os.scandir(directory) as entries:
        for entry in list(entries):
            path = Path(entry.path)
            if not entry.is_dir(follow_symlinks=False):
                path.unlink()
            elif depth == _DEPTH_REMOVED:
                deep.append(path.rename(top / secrets.token_hex(16)))
            else:
                _empty(path, top, deep, depth + 1)
                path.rmdir()

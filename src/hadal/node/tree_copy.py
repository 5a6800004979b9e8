"""A directory tree with everything that an overlay's upper directory means: marks, owners, times."""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

__all__ = ["copy_tree"]

_FICLONE = 0x40049409
_CHUNK = 1 << 26


def copy_tree(source: Path, target: Path) -> None:
    """Copy a tree; the target must not exist. File content is shared where the file system can.

    Raises:
        OSError: As of the system; what is there of the target is the caller's to remove.
    """
    links: dict[tuple[int, int], Path] = {}
    _copy(source, target, os.lstat(source), links)


def _copy(
    source: Path, target: Path, status: os.stat_result, links: dict[tuple[int, int], Path]
) -> None:
    kind = stat.S_IFMT(status.st_mode)
    identity = (status.st_dev, status.st_ino)
    if kind != stat.S_IFDIR and status.st_nlink > 1:
        if identity in links:
            os.link(links[identity], target, follow_symlinks=False)
            return
        links[identity] = target
    if kind == stat.S_IFDIR:
        target.mkdir(mode=0o700)
        with os.scandir(source) as entries:
            for entry in entries:
                _copy(
                    source / entry.name,
                    target / entry.name,
                    entry.stat(follow_symlinks=False),
                    links,
                )
    elif kind == stat.S_IFREG:
        _copy_content(source, target)
    elif kind == stat.S_IFLNK:
        target.symlink_to(source.readlink())
    elif kind != stat.S_IFSOCK:  # a socket without its process is nothing
        os.mknod(target, status.st_mode, status.st_rdev)
    else:
        return
    _copy_attributes(source, target, status, kind)


def _copy_content(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                raise
        _copy_parts(old.fileno(), new.fileno())


def _copy_parts(old: int, new: int) -> None:
    """Copy what is written of a file; what is not stays a hole."""
    end, at = os.fstat(old).st_size, 0
    os.ftruncate(new, end)
    while at < end:
        try:
            at = os.lseek(old, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole is left
        hole = os.lseek(old, at, os.SEEK_HOLE)
        os.lseek(new, at, os.SEEK_SET)
        while at < hole:
            sent = os.sendfile(new, old, at, min(_CHUNK, hole - at))
            if not sent:
                return  # it has shrunk meanwhile
            at += sent


def _copy_attributes(source: Path, target: Path, status: os.stat_result, kind: int) -> None:
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        target.chmod(stat.S_IMODE(status.st_mode))
        for name in os.listxattr(source, follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):  # it has just gone
                value = os.getxattr(source, name, follow_symlinks=False)
                os.setxattr(target, name, value, follow_symlinks=False)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)

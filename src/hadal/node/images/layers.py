"""Layers on disk: each one file or one directory, named by its digest, whole from the moment it is there.

What is being made lies in a folder of `staging/` until it is renamed into place. Whoever makes or uses
something holds a shared lock on it (flock(2)), which ends with the process; who removes something needs
an exclusive one. So nothing in use is ever removed, and what a killed process left is known by nobody
holding it. docs/formats/image-store.md specifies the names and the order of steps.
"""

import errno
import fcntl
import itertools
import logging
import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from hadal.node.images.durable import sync_filesystem, sync_path
from hadal.node.images.erofs import can_mount_erofs, make_erofs, unmount
from hadal.node.images.failures import image_errors
from hadal.node.images.shared import SharedLayers
from hadal.node.images.tree import copy_tree, remove_tree

__all__ = ["Hold", "Layers"]

_KINDS = ("erofs", "meta", "tree")
_LOG = logging.getLogger(__name__)


class Hold:
    """A shared lock on a file or folder: nobody removes it until `close`.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def take(cls, path: Path) -> "Hold | None":
        """Hold what is at a path; None if nothing is."""
        fd = _lock(path, fcntl.LOCK_SH)
        return None if fd is None else cls(path, fd)

    def close(self) -> None:
        """Let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock(path: Path, kind: int) -> int | None:
    """Lock what is at a path and return it open; None if it is gone, or held where LOCK_NB is asked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, kind)
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # in use, or removed while we waited
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


class Layers:
    """The layers of a store.

    Args:
        root: Of the store.
        erofs: Keep layers as EROFS images; None: where they can be made and mounted.
        compress: Compress them with lz4hc: smaller, slower to read.
        shared: Folder for the content of new EROFS images, of which only metadata is kept here.

    Attributes:
        shared: That folder, or None.
    """

    def __init__(
        self,
        root: Path,
        *,
        erofs: bool | None = None,
        compress: bool = False,
        shared: Path | None = None,
    ) -> None:
        self.root = root
        self._folder = root / "layers"
        self._staging = root / "staging"
        self._mounts = root / "mounts"
        self._erofs = erofs
        self._remover = ThreadPoolExecutor(1, "image-store")
        self._compress = compress
        with image_errors("make the image store"):
            self.shared = SharedLayers(shared) if shared is not None else None
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self._folder, self._staging, self._mounts):
                folder.mkdir(exist_ok=True, mode=0o700)

    @property
    def erofs(self) -> bool:
        """Whether new layers become EROFS images; the first question makes and mounts one."""
        if self._erofs is None:
            with self.stage() as folder:
                self._erofs = can_mount_erofs(folder)
        return self._erofs

    @contextmanager
    def stage(self) -> Generator[Path]:
        """Give a folder to make something in; what is left in it at the end is removed.

        After a failure it is gone when the error arrives; otherwise soon, before the process ends.

        Raises:
            ImageError: The disk is full, or not ours to write; inside it too.
        """
        with image_errors("write to the image store"):
            folder, hold = self._make_staging()
            try:
                yield folder
            except BaseException:
                remove_tree(folder)
                hold.close()
                raise
            # Thousands of directories take their time, and nobody needs to wait for it.
            self._remover.submit(_discard, folder, hold)

    def _make_staging(self) -> tuple[Path, Hold]:
        while True:
            folder = self._staging / secrets.token_hex(8)
            folder.mkdir(mode=0o700)
            hold = Hold.take(folder)
            if hold is not None:  # else somebody has swept it before we held it
                return folder, hold

    def settle(self) -> None:
        """Wait until what earlier work has left to remove is removed."""
        self._remover.submit(len, ()).result()

    def find(self, digest: str) -> Hold | None:
        """Hold a layer; None if it is not there in a form that this host can use.

        Where only the shared folder has it, its metadata is copied.

        Raises:
            ImageError: That cannot be done.
        """
        shared = self.shared if self.erofs else None
        has_content = shared is not None and shared.has(digest)
        for kind in _KINDS:
            if kind == "tree" or (self.erofs if kind == "erofs" else has_content):
                hold = Hold.take(self._path(digest, kind))
                if hold is not None:
                    return hold
        if shared is None or not has_content:
            return None
        with self.stage() as folder:
            shared.fetch(digest, folder / "metadata")
            return self._place(folder / "metadata", digest, "meta")

    def _path(self, digest: str, kind: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.{kind}"

    def install(self, tree: Path, digest: str) -> Hold:
        """Make a layer of a directory in a staging folder, and hold it.

        Another process may do the same at once: one of them wins, both hold the same.

        Raises:
            ImageError: It cannot be written as EROFS.
            OSError: The disk is full.
        """
        if not self.erofs:
            sync_filesystem(tree)
            return self._place(tree, digest, "tree")
        made = tree.with_name("image")
        if self.shared is None or not self.shared.is_writable:
            make_erofs(tree, made, compress=self._compress)
            return self._place(made, digest, "erofs")
        blob = tree.with_name("blob")
        make_erofs(tree, made, compress=False, blob=blob)
        self.shared.publish(digest, made, blob)
        return self._place(made, digest, "meta")

    def _place(self, made: Path, digest: str, kind: str) -> Hold:
        """Give what has been made its name, and hold it; or hold what has the name already."""
        target = self._path(digest, kind)
        if made.is_file():
            sync_path(made)
        while (hold := Hold.take(target)) is None:
            hold = Hold.take(made)
            assert hold is not None, "what lies in a staging folder is only ours"
            try:
                _rename_to_new(made, target)
            except FileExistsError:  # another process was faster
                hold.close()
                continue
            sync_path(self._folder)
            hold.path = target
            break
        return hold

    def add_directory(
        self,
        source: Path,
        *,
        upper: bool = False,
        owner: tuple[int, int] | None = None,
        bytes_max: int | None = None,
    ) -> tuple[str, Hold]:
        """Make a layer of a copy of a directory, and hold it; return its digest too.

        Args:
            source: The directory.
            upper: Whether it is the upper directory of an overlay.
            owner: Of all that is in the layer.
            bytes_max: Most bytes of content.

        Raises:
            ImageError: It cannot be read, or is too large, or the disk is full.
        """
        with self.stage() as folder:
            tree = folder / "tree"
            copied = copy_tree(source, tree, upper=upper, owner=owner, bytes_max=bytes_max)
            hold = self.find(copied.digest) or self.install(tree, copied.digest)
        return copied.digest, hold

    def stored_bytes(self, digest: str) -> int:
        """Return the bytes on disk of a layer; 0 if it is not there."""
        return sum(_disk_bytes(self._path(digest, kind)) for kind in _KINDS)

    def known(self) -> set[str]:
        """Return the digests of all layers that are there in any form."""
        return {f"sha256:{path.stem}" for path in self._folder.iterdir()}

    def mount_point(self, digest: str) -> Path:
        """Return where a layer that is an EROFS image is mounted."""
        return self._mounts / digest.removeprefix("sha256:")

    def unmount_idle(self, digest: str) -> None:
        """Unmount a layer, unless a process uses it.

        Raises:
            OSError: As umount2(2).
        """
        fds = self._lock_all(digest)
        if fds is None:
            return
        try:
            with self.lock_mounts():  # so that it is not made and mounted anew meanwhile
                if fds or not any(self._path(digest, kind).exists() for kind in _KINDS):
                    self._forget_mount(digest.removeprefix("sha256:"))
        finally:
            for fd in fds:
                os.close(fd)

    def _lock_all(self, digest: str) -> list[int] | None:
        """Lock every form of a layer for removal; None if somebody uses one."""
        fds: list[int] = []
        for kind in _KINDS:
            path = self._path(digest, kind)
            fd = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd is not None:
                fds.append(fd)
            elif path.exists():
                for locked in fds:
                    os.close(locked)
                return None
        return fds

    @contextmanager
    def lock_mounts(self) -> Generator[None]:
        """Keep others from mounting a layer, for moments.

        Raises:
            OSError: The folder of mounts is gone.
        """
        fd = os.open(self._mounts, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _forget_mount(self, name: str) -> None:
        point = self._mounts / name
        unmount(point)
        if point.exists():
            point.rmdir()

    def sweep(self, keep: Callable[[], set[str]], in_use: Iterable[str]) -> int:
        """Remove what killed processes left and layers that nothing refers to.

        Args:
            keep: Returns the digests that are referred to; called when all others are locked, so that
                a reference that is written meanwhile is seen.
            in_use: More digests to keep.

        Returns:
            Bytes of disk space that are free now.

        Raises:
            OSError: Something cannot be removed.
        """
        self.settle()
        wanted = keep() | set(in_use)  # not to lock what is wanted anyway
        locked: dict[str, list[int]] = {}
        freed = 0
        try:
            for digest in self.known() - wanted:
                fds = self._lock_all(digest)
                if fds is not None:
                    locked[digest] = fds
            for digest in locked.keys() - (wanted | keep()):
                self._forget_mount(digest.removeprefix("sha256:"))
                for kind in _KINDS:
                    with suppress(FileNotFoundError):
                        self._path(digest, kind).rename(self._staging / secrets.token_hex(8))
        finally:
            for fd in itertools.chain.from_iterable(locked.values()):
                os.close(fd)
        for point in self._mounts.iterdir():
            self.unmount_idle(point.name)
        for path in self._staging.iterdir():
            freed += _remove_left(path)
        return freed


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename; never replace.

    Raises:
        FileExistsError: Something is there.
    """
    if source.is_dir():
        try:
            source.rename(target)  # replaces an empty directory at most, and a layer is never empty
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(error.errno, error.strerror, str(target)) from error
            raise
    else:
        target.hardlink_to(source)
        source.unlink()


def _disk_bytes(path: Path) -> int:
    """Return the bytes on disk of a file or tree; what vanishes meanwhile counts nothing."""
    total = 0
    pending = [path]
    while pending:
        at = pending.pop()
        try:
            status = at.lstat()
            total += status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                pending.extend(at.iterdir())
        except OSError:
            continue
    return total


def _discard(folder: Path, hold: Hold) -> None:
    try:
        remove_tree(folder)
    except OSError as error:
        _LOG.warning("cannot remove %s, `hadal image prune` will try again: %s", folder, error)
    finally:
        hold.close()


def _remove_left(path: Path) -> int:
    fd = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if fd is None:
        return 0
    try:
        size = _disk_bytes(path)
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()
        return size
    except OSError as error:
        # A program that a killed process has left behind still writes there: the next time, then.
        if error.errno != errno.ENOTEMPTY:
            raise
        return 0
    finally:
        os.close(fd)

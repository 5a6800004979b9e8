"""EROFS images: made by mkfs.erofs, mounted from a plain file by mount(2), without a loop device."""

import ctypes
import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path

from hadal.errors import ImageError

__all__ = ["can_mount_erofs", "make_erofs", "mount_erofs", "unmount"]

_LOG = logging.getLogger(__name__)
_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4
_DETACH = 2
_CHUNK = 1 << 20
# mkfs.erofs takes times beyond this for this, and writes it into the superblock: with any moment that no
# file has, times are kept and equal trees give equal images.
_LATEST_TIME_S = 253402300799
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_UUID = "00000000-0000-0000-0000-000000000000"


def make_erofs(tree: Path, target: Path, *, compress: bool, blob: Path | None = None) -> None:
    """Write a directory as an EROFS image; equal trees give equal files.

    Args:
        tree: The directory.
        target: The file to make.
        compress: With lz4hc.
        blob: Another file to make, for the content of files; then `target` has metadata only.

    Raises:
        ImageError: mkfs.erofs is not there or fails; the target is not to be used then.
    """
    options = ["-zlz4hc"] if compress else []
    if blob is not None:
        options += [f"--chunksize={_CHUNK}", f"--blobdev={blob}"]
    command = ["mkfs.erofs", "--quiet", f"-U{_UUID}", *options, str(target), str(tree)]
    environment = {"PATH": _PATH, "SOURCE_DATE_EPOCH": str(_LATEST_TIME_S), "LC_ALL": "C"}
    try:
        made = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        raise ImageError(f"cannot run mkfs.erofs: {error}") from error
    if made.returncode != 0:
        lines = made.stdout.decode(errors="replace").strip().splitlines()
        reason = lines[-1][:300] if lines else f"status {made.returncode}"
        full = "No space left" in reason or "disk full" in reason.lower()
        raise ImageError(
            f"cannot write a layer as EROFS: {reason}",
            hint="free some space there, or run: hadal image prune" if full else None,
        )


def mount_erofs(image: Path, target: Path, blob: Path | None = None) -> None:
    """Mount an image, read only; with its blob, where it has one.

    Raises:
        OSError: As mount(2): ENOTBLK where the kernel mounts block devices only (before 6.12), ENODEV
            without EROFS.
    """
    flags = _READ_ONLY | _NO_SUID | _NO_DEVICES
    options = None if blob is None else b"device=" + os.fsencode(blob)
    if _LIBC.mount(os.fsencode(image), os.fsencode(target), b"erofs", flags, options):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(image))


def unmount(target: Path) -> None:
    """Take a mount away; who has files of it open keeps them. Not mounted: nothing happens.

    Raises:
        OSError: As umount2(2).
    """
    if _LIBC.umount2(os.fsencode(target), _DETACH):
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise OSError(number, os.strerror(number), str(target))


def can_mount_erofs(folder: Path) -> bool:
    """Return whether EROFS images can be made here and mounted from files; log why not.

    Args:
        folder: Empty, for the trial; on the file system that is to hold the images.
    """
    if shutil.which("mkfs.erofs", path=_PATH) is None:
        _LOG.info("layers are kept as directories: mkfs.erofs is not installed")
        return False
    tree, image, target = (folder / name for name in ("tree", "image", "mount"))
    try:
        tree.mkdir()
        target.mkdir()
        make_erofs(tree, image, compress=False)
        mount_erofs(image, target)
        unmount(target)
    except (ImageError, OSError) as error:
        _LOG.warning("layers are kept as directories: EROFS cannot be mounted here: %s", error)
        return False
    return True

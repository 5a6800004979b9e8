"""The layer that a copy step of a recipe makes."""

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hadal.errors import ImageError
from hadal.node.images.failures import image_errors
from hadal.node.images.tree import copy_tree

__all__ = ["place_copy"]

_ROOT = (0, 0)


def place_copy(
    source: Path, to: str, tree: Path, *, below: Sequence[Path], bytes_max: int | None
) -> None:
    """Make a tree that holds a copy at its place, everything in it root's.

    Directories above that place look as they do in the image; where it has none they are 0755.

    Args:
        source: File or directory.
        to: Absolute path in the image, of the copy itself.
        tree: Directory to make.
        below: Layers of the image, the top one first.
        bytes_max: Most bytes of content.

    Raises:
        ImageError: The place cannot be, or what is copied is too large.
        OSError: Something cannot be read or written.
    """
    path = PurePosixPath(to)
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or "\0" in to:
        raise ImageError(f"cannot copy to {to!r:.200}: expected a path such as /app")
    tree.mkdir()
    _look_like(tree, PurePosixPath("."), below)
    inside = path.relative_to("/")
    for above in reversed(inside.parents[:-1]):
        (tree / above).mkdir()
        _look_like(tree / above, above, below)
    with image_errors("copy into an image"):
        status = source.stat()
    target = tree / inside
    if stat.S_ISDIR(status.st_mode):
        copy_tree(source, target, owner=_ROOT, bytes_max=bytes_max)
    elif stat.S_ISREG(status.st_mode):
        if bytes_max is not None and status.st_size > bytes_max:
            raise ImageError(f"{source}: {status.st_size:,} bytes; expected at most {bytes_max:,}")
        shutil.copyfile(source, target)
        target.chmod(stat.S_IMODE(status.st_mode))
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
    else:
        raise ImageError(f"cannot copy {source}: expected a file or directory")
    for above in (*inside.parents,):  # writing into them has changed their times
        os.utime(tree / above, ns=(0, 0))


def _look_like(made: Path, inside: PurePosixPath, below: Sequence[Path]) -> None:
    """Give a directory mode and owner of the one that it will lie over."""
    made.chmod(0o755)
    for layer in below:
        try:
            status = (layer / inside).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISLNK(status.st_mode):
            raise ImageError(
                f"cannot copy into /{inside}: it is a link in the image",
                hint="copy to where it leads",
            )
        if stat.S_ISDIR(status.st_mode):
            os.chown(made, status.st_uid, status.st_gid)
            made.chmod(stat.S_IMODE(status.st_mode))
        return

"""Removing what a box leaves behind: any number of files, and directories in each other to any depth."""

import contextlib
import os
from pathlib import Path

__all__ = ["remove_tree"]


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; what cannot be removed stays, and so does a path that is none.

    Boxes nest directories deeper than a stack or the limit of open files goes: this needs neither.
    Nobody else may change the tree meanwhile.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        here = os.open(path, flags)
    except OSError:
        return
    above: list[tuple[str, list[str]]] = []
    pending = _remove_files(here)
    try:
        while pending or above:
            if pending:
                below = os.open(pending[-1], flags, dir_fd=here)
                above.append((pending.pop(), pending))
                os.close(here)
                here = below
                pending = _remove_files(here)
                continue
            name, pending = above.pop()
            parent = os.open("..", flags, dir_fd=here)
            os.close(here)
            here = parent
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=here)
    except OSError:
        pass
    finally:
        os.close(here)
    with contextlib.suppress(OSError):
        path.rmdir()


def _remove_files(folder: int) -> list[str]:
    """Remove what is no directory, and the empty ones; return the names of the others."""
    full: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    os.rmdir(entry.name, dir_fd=folder)
                else:
                    os.unlink(entry.name, dir_fd=folder)
            except OSError:
                if entry.is_dir(follow_symlinks=False):
                    full.append(entry.name)
    return full

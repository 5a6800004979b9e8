"""A root file system of some programs of this host, with the libraries that they need."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from hadal.node.images.host import make_skeleton

__all__ = ["copy_program", "make_small_root"]

_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_PLACES = "/usr/bin:/bin:/usr/sbin:/sbin"


def make_small_root(root: Path, programs: Iterable[str]) -> None:
    """Make it, with those of the programs that this host has.

    Args:
        root: A new directory.
        programs: Their names.

    Raises:
        OSError: The disk is full, or a program cannot be read.
    """
    make_skeleton(root)
    for name in programs:
        found = shutil.which(name, path=_PLACES)
        if found is not None:
            copy_program(Path(found), root)


def copy_program(program: Path, root: Path) -> None:
    """Copy a program and its libraries to their places below a root."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    for path in (program, *map(Path, _LIBRARY.findall(said))):
        _copy(path, root)


def _copy(path: Path, root: Path) -> None:
    """Copy a file to its real place; links in /lib and /bin lead there."""
    real = Path(os.path.realpath(path))
    for place in (real, Path(os.path.realpath(path.parent)) / path.name):
        target = root / place.relative_to("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(real, target)

"""An image for machines: programs of this host, with the libraries that they need, as one EROFS layer."""

import asyncio
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hadal.errors import UnsupportedError
from hadal.node.images import ImageStore
from hadal.node.images.host import make_skeleton
from hadal.node.machines.kernel import find_kernel
from hadal.node.machines.qemu import qemu_program

PROGRAMS = (
    "bash", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "dmesg", "du", "echo", "env", "find", "free", "grep",
    "head", "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mkfifo", "mktemp", "mount", "mv", "nohup", "nproc", "od", "printf",
    "ps", "pwd", "python3", "readlink", "rm", "rmdir", "sed", "seq", "sh", "sha256sum", "sleep", "sort", "stat",
    "stty", "sync", "tail", "tar", "tee", "test", "timeout", "touch", "tr", "true", "tty", "umount", "uname", "uniq",
    "wc", "which", "yes",
)  # fmt: skip
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


def needs_machines():
    """Skip where this host cannot run virtual machines."""
    try:
        qemu_program()
        find_kernel(Path("/nowhere"))
    except UnsupportedError as error:
        pytest.skip(f"{error.message}; {error.hint}")


@functools.cache
def _libraries(program):
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [Path(path) for path in _LIBRARY.findall(said)]


def _copy(path, root):
    """Copy a file to its real place below a root; links in /lib and /bin lead there."""
    real = Path(os.path.realpath(path))
    for place in (real, Path(os.path.realpath(path.parent)) / path.name):
        target = root / place.relative_to("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(real, target)


def make_root(root):
    """Make the root of a small system."""
    make_skeleton(root)
    for name in PROGRAMS:
        found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
        if found is None:
            continue
        _copy(Path(found), root)
        for library in _libraries(found):
            _copy(library, root)
    modules = sorted(Path("/usr/lib").glob("python3.*/os.py"))
    if modules:
        folder = modules[-1].parent
        leave_out = shutil.ignore_patterns(
            "test", "__pycache__", "ensurepip", "idlelib", "*.a", "config-*"
        )
        shutil.copytree(
            folder, root / folder.relative_to("/"), ignore=leave_out, dirs_exist_ok=True
        )


def import_image(store: Path, folder: Path, name="machine-lab:1"):
    """Put the image into a store."""
    root = folder / "root"
    make_root(root)
    asyncio.run(ImageStore(store).import_directory(root, name))
    shutil.rmtree(root)
    return name

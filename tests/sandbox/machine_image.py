"""An image for machines: programs of this host, with the libraries that they need, as one EROFS layer."""

import asyncio
import shutil
from pathlib import Path

import pytest

from hadal.bench.small_root import make_small_root
from hadal.errors import UnsupportedError
from hadal.node.images import ImageStore
from hadal.node.machines.kernel import find_kernel
from hadal.node.machines.qemu import qemu_program

PROGRAMS = (
    "bash", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "dmesg", "du", "echo", "env", "find", "free", "grep",
    "head", "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mkfifo", "mktemp", "mount", "mv", "nohup", "nproc", "od", "printf",
    "ps", "pwd", "python3", "readlink", "rm", "rmdir", "sed", "seq", "sh", "sha256sum", "sleep", "sort", "stat",
    "stty", "sync", "tail", "tar", "tee", "test", "timeout", "touch", "tr", "true", "tty", "umount", "uname", "uniq",
    "wc", "which", "yes",
)  # fmt: skip


def needs_machines():
    """Skip where this host cannot run virtual machines."""
    try:
        qemu_program()
        find_kernel(Path("/nowhere"))
    except UnsupportedError as error:
        pytest.skip(f"{error.message}; {error.hint}")


def make_root(root):
    """Make the root of a small system."""
    make_small_root(root, PROGRAMS)
    modules = sorted(Path("/usr/lib").glob("python3.*/os.py"))
    if modules:
        folder = modules[-1].parent
        leave_out = shutil.ignore_patterns(
            "test", "__pycache__", "ensurepip", "idlelib", "*.a", "config-*"
        )
        shutil.copytree(
            folder, root / folder.relative_to("/"), ignore=leave_out, dirs_exist_ok=True
        )


def import_image(store: Path, folder: Path, name="machine-lab:1", files=None):
    """Put the image into a store, with more files: text by path."""
    root = folder / "root"
    make_root(root)
    for path, text in (files or {}).items():
        (root / path).write_text(text)
    asyncio.run(ImageStore(store).import_directory(root, name))
    shutil.rmtree(root)
    return name


def qemu_of(box):
    """The process of a machine on the host: of those in its groups the one that is no init."""
    for group in Path("/sys/fs/cgroup").glob(f"pids/hadal/*/{box.id}/cgroup.procs"):
        for pid in map(int, group.read_text().split()):
            if "qemu" in Path(f"/proc/{pid}/comm").read_text():
                return pid
    raise AssertionError("no QEMU")

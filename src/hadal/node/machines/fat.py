"""Small FAT file systems: what firmware starts from, and what a system looks for when it boots first."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from hadal.errors import NodeError, UnsupportedError

__all__ = ["make_fat"]


def make_fat(path: Path, size_mb: int, label: str, files: dict[str, bytes]) -> None:
    """Write a FAT file system into a new file.

    Args:
        path: Of it.
        size_mb: MiB of it.
        label: Its name, of at most 11 characters.
        files: Content of each, by its path in there.

    Raises:
        UnsupportedError: This host has no dosfstools or mtools.
        NodeError: A tool fails: it is full, most likely.
    """
    mkfs, mcopy, mmd = (shutil.which(name) for name in ("mkfs.fat", "mcopy", "mmd"))
    if mkfs is None or mcopy is None or mmd is None:
        raise UnsupportedError(
            "no mkfs.fat or mcopy to make a FAT file system with",
            hint="Debian: apt-get install dosfstools mtools",
        )
    with path.open("xb") as file:
        file.truncate(size_mb << 20)
    _run([mkfs, "-n", label, str(path)])
    folders = {str(p) for name in files for p in Path(name).parents if str(p) != "."}
    for folder in sorted(folders):
        _run([mmd, "-i", str(path), f"::{folder}"])
    with tempfile.NamedTemporaryFile(prefix="hadal-fat-") as part:
        for name, content in files.items():
            Path(part.name).write_bytes(content)
            _run([mcopy, "-i", str(path), part.name, f"::{name}"])


def _run(call: list[str]) -> None:
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodeError(f"{Path(call[0]).name} fails: {done.stderr.strip()[-500:]}")

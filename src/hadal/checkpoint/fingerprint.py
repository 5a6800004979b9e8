"""What tells one checkpoint from another without reading all of it."""

import hashlib
from pathlib import Path

from hadal.errors import StorageError

__all__ = ["fingerprint"]

_END = 1 << 20
"""Bytes that are read at either end of a file."""


def fingerprint(folder: Path) -> str:
    """Return a digest of the names and sizes of a folder's files and of a MiB at both ends of each.

    Weights that were trained on, exported again or stored otherwise differ there; a file that was changed in its
    middle alone is not noticed.

    Raises:
        StorageError: They cannot be read.
    """
    whole = hashlib.sha256()
    try:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            size = path.stat().st_size
            whole.update(repr((path.name, size)).encode())
            with path.open("rb") as file:
                whole.update(file.read(_END))
                file.seek(max(_END, size - _END))
                whole.update(file.read(_END))
    except OSError as error:
        raise StorageError(f"cannot read the checkpoint {folder}: {error}") from error
    return whole.hexdigest()

"""What a box has changed against its image: read from its overlay's upper directory."""

import hashlib
import os
import stat
from pathlib import Path

from hadal.sandbox.results import Change

__all__ = ["list_changes"]

_CHUNK = 1 << 20
_OPAQUE = "trusted.overlay.opaque"


def list_changes(upper: Path) -> list[Change]:
    """Return every path that was written, removed or replaced, sorted; content by its digest."""
    found: list[Change] = []
    _walk(upper, "", found)
    return sorted(found, key=lambda change: change.path)


def _walk(folder: Path, prefix: str, found: list[Change]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{prefix}/{entry.name}"
            status = entry.stat(follow_symlinks=False)
            found.append(_change(folder / entry.name, path, status))
            if stat.S_ISDIR(status.st_mode):
                _walk(folder / entry.name, path, found)


def _change(real: Path, path: str, status: os.stat_result) -> Change:
    kind = stat.S_IFMT(status.st_mode)
    removed = kind == stat.S_IFCHR and status.st_rdev == 0
    digest = None
    if kind == stat.S_IFREG:
        digest = _digest(real)
    elif kind == stat.S_IFLNK:
        digest = hashlib.sha256(os.fsencode(real.readlink())).hexdigest()
    replaced = kind == stat.S_IFDIR and _has(real, _OPAQUE)
    return Change(
        path=path,
        kind="removed" if removed else "replaced" if replaced else "written",
        directory=kind == stat.S_IFDIR,
        mode=stat.S_IMODE(status.st_mode),
        size=status.st_size if kind == stat.S_IFREG else 0,
        digest=digest,
        changed_ns=status.st_ctime_ns,
    )


def _has(path: Path, name: str) -> bool:
    return name in os.listxattr(path, follow_symlinks=False)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()

"""Layers whose content lies in a folder that many machines see (3FS, NFS, any mount).

A machine keeps the metadata of a layer, a small EROFS image; what boxes read of the content comes through
the mount as they read it, with the kernel's readahead and page cache. Files appear whole and are never
changed. Nothing here removes them: no machine knows what others use.
"""

import os
import secrets
import shutil
from pathlib import Path

from hadal.node.images.durable import sync_path

__all__ = ["SharedLayers"]


class SharedLayers:
    """A folder of metadata images and blobs, by the digests of their layers.

    Whoever can write there decides what is in every box: it is trusted like the store itself.

    Args:
        folder: Mounted; made where it is missing.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_writable(self) -> bool:
        """Whether this machine may publish; else what it makes itself stays with it."""
        return os.access(self._folder, os.W_OK)

    def blob(self, digest: str) -> Path:
        """Return where the content of a layer lies."""
        return self._folder / f"{digest.removeprefix('sha256:')}.blob"

    def _metadata(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.meta"

    def has(self, digest: str) -> bool:
        """Return whether a layer is there, whole."""
        return self._metadata(digest).exists() and self.blob(digest).exists()

    def publish(self, digest: str, metadata: Path, blob: Path) -> None:
        """Copy a layer into the folder. Where another machine has done so, it is the same.

        Raises:
            OSError: It is full, or cannot be written.
        """
        for source, target in ((blob, self.blob(digest)), (metadata, self._metadata(digest))):
            part = target.with_name(f"{secrets.token_hex(8)}.part")
            try:
                shutil.copyfile(source, part)
                sync_path(part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        sync_path(self._folder)

    def fetch(self, digest: str, target: Path) -> None:
        """Copy the metadata of a layer.

        Raises:
            OSError: It cannot be read, or the copy not be written.
        """
        shutil.copyfile(self._metadata(digest), target)

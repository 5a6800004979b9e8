"""Folders by names that people give: complete, or not there; a new one takes the place of the old."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Generator
from pathlib import Path

from hadal.errors import ConfigError

__all__ = ["NamedFolders"]

_NAME_MAX = 128
_LEFT_S = 86400.0
"""What is half done for so long nobody is working at."""


class NamedFolders:
    """Those in a folder. Several processes may use it.

    Args:
        folder: Where they lie.
        what: They are, for errors.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self._folder = folder
        self._what = what

    @contextlib.contextmanager
    def new(self, name: str) -> Generator[Path]:
        """Yield a folder that has the name when the block is left, and is gone when it fails.

        Raises:
            ConfigError: It cannot have that name.
            OSError: The disk is full.
        """
        old, part = self.path(name), self._hidden()
        part.mkdir(parents=True, mode=0o700)
        try:
            yield part
            if old.exists():
                old.rename(self._hidden(replaced=True))
            part.rename(old)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.sweep()

    def path(self, name: str) -> Path:
        """Return where one is, or would be.

        Raises:
            ConfigError: It cannot have that name.
        """
        odd = not name.isprintable() or "/" in name or name[:1] in ("", ".") or name.strip() != name
        if odd or len(os.fsencode(name)) > _NAME_MAX:
            raise ConfigError(
                f"no {self._what} can be called {name!r:.200}",
                hint=f"a name has up to {_NAME_MAX} bytes, no / and no . at its beginning",
            )
        return self._folder / name

    def names(self) -> list[str]:
        """Return the names of all."""
        return [path.name for path in self._folder.glob("[!.]*")]

    def remove(self, name: str) -> None:
        """Remove one that is there; what others have of it by hard links stays."""
        self.path(name).rename(self._hidden(replaced=True))
        self.sweep()

    def sweep(self, *, left_s: float = _LEFT_S) -> None:
        """Remove what has been replaced, and what an earlier process has left half done.

        Args:
            left_s: Seconds for which nobody has worked at that. 0 where no other process may.
        """
        for path in self._folder.glob(".*"):
            with contextlib.suppress(FileNotFoundError):  # another one sweeps, too
                if path.name.startswith(".old-") or time.time() - path.stat().st_mtime >= left_s:
                    shutil.rmtree(path, ignore_errors=True)

    def _hidden(self, *, replaced: bool = False) -> Path:
        return self._folder / f".{'old' if replaced else 'new'}-{uuid.uuid4().hex}"

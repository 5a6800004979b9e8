"""Content by its digest: what was written into boxes, and output that is too large for the journal."""

import hashlib
import os
import secrets
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import JournalError

__all__ = ["Blob", "Blobs"]


@dataclass(frozen=True)
class Blob:
    """Content that is kept: sha256 in hex, and bytes."""

    digest: str
    size: int


class Blobs:
    """A folder of them. Equal content is kept once; a name is there only when all of it is.

    Args:
        folder: Made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return where a blob lies."""
        return self._folder / digest[:2] / digest[2:]

    def put(self, data: bytes) -> Blob:
        """Keep bytes.

        Raises:
            JournalError: The disk is full.
        """
        digest = hashlib.sha256(data).hexdigest()
        if not self.path(digest).exists():
            with self._errors(digest):
                part = self._folder / f"part-{secrets.token_hex(8)}"
                try:
                    part.write_bytes(data)
                    self._move(part, digest)
                finally:
                    part.unlink(missing_ok=True)
        return Blob(digest, len(data))

    async def take(self, chunks: AsyncIterable[bytes]) -> Blob:
        """Keep a stream of any size."""
        sha, size = hashlib.sha256(), 0
        part = self._folder / f"part-{secrets.token_hex(8)}"
        try:
            with self._errors("a stream"), part.open("wb") as file:
                async for chunk in chunks:
                    sha.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
            digest = sha.hexdigest()
            with self._errors(digest):
                self._move(part, digest)
        finally:
            part.unlink(missing_ok=True)
        return Blob(digest, size)

    def _move(self, part: Path, digest: str) -> None:
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        part.replace(target)

    def read(self, digest: str) -> bytes:
        """Return the content of a blob.

        Raises:
            JournalError: It is not there, or is not what its name says.
        """
        try:
            data = self.path(digest).read_bytes()
        except OSError as error:
            raise JournalError(f"blob {digest[:12]}…: {os.strerror(error.errno or 0)}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise JournalError(f"blob {digest[:12]}… is damaged: its content has another digest")
        return data

    def sweep(self) -> None:
        """Remove what a killed process left half-made."""
        for part in self._folder.glob("part-*"):
            part.unlink(missing_ok=True)

    @staticmethod
    def _errors(what: str) -> "_Named":
        return _Named(what)


class _Named:
    """Turns errors of the disk into ours."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise JournalError(
                f"cannot keep {self._what}: {error.strerror}", hint="free space on the node's disk"
            ) from error

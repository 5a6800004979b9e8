"""Blocks and checkpoints on disk: append-only segments with checksums.

A record that is not whole and right is a record that is not there: after kill -9, a full disk, a torn
write or a flipped bit the engine computes instead. Nothing is ever changed in place. One process may
use a folder at a time; the oldest segment goes when the folder is full.

Record: magic, kind, key, length of the payload, digest of those four; payload (safetensors); digest of
the payload. Nothing read here is executed or unpickled.
"""

import fcntl
import os
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hadal.engine.block_pool import BlockKey
from hadal.errors import StorageError

__all__ = ["DiskStore", "DiskUse"]

_MAGIC: Final = b"hdl1"
_HEAD: Final = struct.Struct("<4sc16sQ")
_DIGEST_BYTES: Final = 8
_PREFIX_BYTES: Final = _HEAD.size + _DIGEST_BYTES
_SEGMENTS: Final = 16
"""Segments that a full folder has: room is made in steps of a sixteenth."""


@dataclass(frozen=True)
class DiskUse:
    """State of a folder, and what went wrong since it was opened.

    Attributes:
        num_bytes: Of all segments.
        num_records: That can be read.
        damaged: Records dropped because a digest was wrong or their end was missing.
        failed_writes: Records that could not be written.
        error: Of the last failed write, or "".
    """

    num_bytes: int
    num_records: int
    damaged: int
    failed_writes: int
    error: str


@dataclass(frozen=True)
class _Place:
    """Where a payload is."""

    segment: int
    offset: int
    """Of the payload."""
    length: int


class DiskStore:
    """A folder of segments.

    Args:
        path: Folder; made if it is not there.
        limit: Bytes that it may take.

    Raises:
        StorageError: The folder cannot be made or read, or another process uses it.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._index: dict[tuple[bytes, BlockKey], _Place] = {}
        self._sizes: dict[int, int] = {}
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._damaged = self._failed = 0
        self._error = ""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file in sorted(path.glob("segment-*.hdl")):
                self._scan(file)
        except BlockingIOError:
            raise StorageError(
                f"{path}: another engine uses this cache folder",
                hint="give each engine a disk_path of its own",
            ) from None
        except OSError as err:
            raise StorageError(f"{path}: cannot use this cache folder: {err.strerror}") from err

    def use(self) -> DiskUse:
        """Return how full the folder is and what went wrong."""
        total, records = sum(self._sizes.values()), len(self._index)
        return DiskUse(total, records, self._damaged, self._failed, self._error)

    def __contains__(self, record: tuple[bytes, BlockKey]) -> bool:
        return record in self._index

    def put(self, kind: bytes, key: BlockKey, tensors: list[Tensor]) -> None:
        """Append a record, unless it is there. A failure is counted, not raised."""
        if self.get(kind, key) is not None:  # rare: why else was it computed? So look, do not trust
            return
        named = {str(i): t.detach().cpu().contiguous() for i, t in enumerate(tensors)}
        payload = safetensors.torch.save(named)
        head = _HEAD.pack(_MAGIC, kind, key, len(payload))
        record = b"".join((head, _digest(head), payload, _digest(payload)))
        try:
            segment = self._segment_for(len(record))
            offset = self._sizes[segment]
            self._append(segment, record)
        except OSError as err:
            self._failed += 1
            self._error = err.strerror or str(err)
            self._retire_writer()
            return
        self._index[kind, key] = _Place(segment, offset + _PREFIX_BYTES, len(payload))

    def get(self, kind: bytes, key: BlockKey) -> list[Tensor] | None:
        """Return a record's tensors; None, and forget it, if any bit of it is wrong."""
        place = self._index.get((kind, key))
        if place is None:
            return None
        try:
            data = os.pread(self._reader(place.segment), place.length + _DIGEST_BYTES, place.offset)
            payload, digest = data[: place.length], data[place.length :]
            if len(payload) == place.length and digest == _digest(payload):
                named = safetensors.torch.load(payload)
                return [named[str(i)] for i in range(len(named))]
        except (OSError, SafetensorError):
            pass  # as damaged as a wrong digest
        self._damaged += 1
        del self._index[kind, key]
        return None

    def close(self) -> None:
        """Let another process use the folder."""
        self._retire_writer()
        for reader in self._readers.values():
            os.close(reader)
        self._readers.clear()
        self._index.clear()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _file(self, segment: int) -> Path:
        return self._path / f"segment-{segment:08d}.hdl"

    def _scan(self, file: Path) -> None:
        """Index the records of a segment up to the first that is not whole."""
        number = file.stem.removeprefix("segment-")
        if not number.isdigit():
            return
        segment, size = int(number), file.stat().st_size
        self._sizes[segment] = size
        reader, at = self._reader(segment), 0
        while at < size:
            prefix = os.pread(reader, _PREFIX_BYTES, at)
            head, digest = prefix[: _HEAD.size], prefix[_HEAD.size :]
            if len(prefix) < _PREFIX_BYTES or digest != _digest(head):
                self._damaged += 1
                return
            _, kind, key, length = _HEAD.unpack(head)
            end = at + _PREFIX_BYTES + length + _DIGEST_BYTES
            if end > size:
                self._damaged += 1
                return
            self._index[kind, key] = _Place(segment, at + _PREFIX_BYTES, length)
            at = end

    def _reader(self, segment: int) -> int:
        if segment not in self._readers:
            self._readers[segment] = os.open(self._file(segment), os.O_RDONLY | os.O_CLOEXEC)
        return self._readers[segment]

    def _segment_for(self, num_bytes: int) -> int:
        """Return the segment to append to, with room made in the folder."""
        if num_bytes > self._limit:
            raise OSError(f"a record of {num_bytes} bytes is larger than disk_bytes {self._limit}")
        last = max(self._sizes, default=-1)
        if self._writer is None or self._sizes[last] + num_bytes > self._limit // _SEGMENTS:
            self._retire_writer()
            last += 1
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._writer = os.open(self._file(last), flags, 0o600)
            self._sizes[last] = 0
        while sum(self._sizes.values()) + num_bytes > self._limit and len(self._sizes) > 1:
            self._remove(min(self._sizes))
        return last

    def _append(self, segment: int, record: bytes) -> None:
        assert self._writer is not None
        view = memoryview(record)
        while view:
            written = os.write(self._writer, view)
            self._sizes[segment] += written
            view = view[written:]

    def _retire_writer(self) -> None:
        """Stop appending to a segment: after a failure its end may be half a record."""
        if self._writer is not None:
            os.close(self._writer)
        self._writer = None

    def _remove(self, segment: int) -> None:
        self._index = {k: p for k, p in self._index.items() if p.segment != segment}
        if segment in self._readers:
            os.close(self._readers.pop(segment))
        self._file(segment).unlink(missing_ok=True)
        del self._sizes[segment]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()

"""What a machine has changed: packed in the machine, since nobody else reads a disk that it writes.

The archive is an image layer (docs/formats/guest-protocol.md): a pax header before every entry, whiteouts
for what is gone. The guest wrote it, and it is not trusted: what it may hold of memory is limited, and what
is not as our guest writes it is an error.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from hadal.errors import NodeError, SandboxFileError
from hadal.node.box import Box
from hadal.sandbox.results import Change

__all__ = ["list_layer", "packed_changes"]

_BLOCK = 512
_CHUNK = 1 << 20
_HEADER_MAX = 1 << 20
"""Bytes of names and attributes of one entry."""
_ROOM = 64 << 20
"""Of headers, beside twice what fits on the disk: for holes."""
_MARK, _OPAQUE = ".wh.", ".wh..wh..opq"


@contextlib.asynccontextmanager
async def packed_changes(box: Box) -> AsyncGenerator[Path]:
    """Yield an archive of what a machine has changed.

    Raises:
        SandboxFileError: The guest cannot pack it, or sparse files make it too large.
        NodeError: The disk is full.
        SandboxGoneError: The box has ended.
    """
    path = box.folder / f"changes-{uuid.uuid4().hex}"
    limit = (box.spec.disk_mb << 21) + _ROOM
    try:
        with path.open("xb") as file, box.open_applet("changes", user="0", kept=True) as running:
            async for data in box.applet_output(running, ("changes", "/")):
                if file.tell() + len(data) > limit:
                    raise SandboxFileError(
                        errno.EFBIG, "/", hint="sparse files count with their holes"
                    )
                await asyncio.to_thread(file.write, data)
        yield path
    except OSError as error:
        if isinstance(error, SandboxFileError):
            raise
        raise NodeError(
            f"cannot store what the machine {box.id} has changed: {error.strerror}",
            hint="free space on the node's disk",
        ) from error
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Entry:
    path: str
    kind: str
    mode: int
    size: int
    link: str
    changed_ns: int


def list_layer(
    archive: Path, *, most: int, content: bool = True, limit: int | None = None
) -> list[Change]:
    """Return every path in an archive of changes, as `hadal.node.changes.list_changes` does.

    Args:
        archive: The file.
        most: Entries that the machine's disk has room for.
        content: Whether to return digests.
        limit: More paths than that are an error.

    Raises:
        SandboxFileError: There are more changes than `limit`.
        NodeError: It is not what our guest writes.
    """
    found: dict[str, Change] = {}
    with archive.open("rb") as file:
        for entry in _entries(file):
            above, _, name = entry.path.rpartition("/")
            digest = _digest(file, entry) if content else _skip(file, entry)
            if name == _OPAQUE:
                if above in found:
                    found[above] = replace(found[above], kind="replaced")
                continue
            change = Change(
                path=f"{above}/{name.removeprefix(_MARK)}",
                kind="removed" if name.startswith(_MARK) else "written",
                directory=entry.kind == "5",
                mode=entry.mode,
                size=entry.size,
                digest=None if name.startswith(_MARK) else digest,
                changed_ns=entry.changed_ns,
            )
            if entry.kind == "1":
                first = found.get(_absolute(entry.link))
                if first is None:
                    raise NodeError(f"changes of a machine: a link to {entry.link!r:.200}, which is not there")  # fmt: skip
                change = replace(change, size=first.size, digest=first.digest)
            if change.path == "/":
                continue
            if len(found) == most:
                raise NodeError(f"changes of a machine: more than the {most:,} files that it may have")  # fmt: skip
            if len(found) == limit:
                raise SandboxFileError(
                    errno.EOVERFLOW, "/", hint=f"more than {limit:,} paths differ from the image"
                )
            found[change.path] = change
    return sorted(found.values(), key=lambda change: change.path)


def _absolute(path: str) -> str:
    return "/" + path.removeprefix("./").rstrip("/")


def _entries(file: IO[bytes]) -> Iterator[_Entry]:
    """Yield each entry, with the file at its content, which whoever takes it has to read."""
    long: dict[str, str] = {}
    changed_ns = 0
    while True:
        header = _read(file, _BLOCK)
        if not header.strip(b"\0"):
            return
        kind, size = chr(header[156]), _number(header[124:136])
        if kind in "xLK":
            data = _read(file, _padded(size))[:size] if size <= _HEADER_MAX else b""
            if len(data) != size:
                raise NodeError(f"changes of a machine: a header of {size:,} bytes")
            if kind == "x":
                changed_ns = _changed_ns(data)
            else:
                long[kind] = os.fsdecode(data.rstrip(b"\0"))
            continue
        path = long.get("L", os.fsdecode(header[:100].rstrip(b"\0")))
        link = long.get("K", os.fsdecode(header[157:257].rstrip(b"\0")))
        yield _Entry(_absolute(path), kind, _number(header[100:108]), size, link, changed_ns)
        long.clear()


def _read(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise NodeError("changes of a machine: the archive is cut off")
    return data


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _number(field: bytes) -> int:
    try:
        if field[0] & 0x80:
            return int.from_bytes(field[1:], "big")
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise NodeError(f"changes of a machine: no number: {field!r}") from error


def _changed_ns(data: bytes) -> int:
    """Return the time of change that a pax header has."""
    at = 0
    while at < len(data):
        length, space, _ = data[at : at + 8].partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(data) - at:
            raise NodeError("changes of a machine: no pax header")
        record = data[at + len(length) + 1 : at + int(length) - 1]
        key, _, value = record.partition(b"=")
        if key == b"ctime":
            seconds, _, nanoseconds = value.decode("ascii", "replace").partition(".")
            if seconds.isdigit() and nanoseconds.isdigit():
                return int(seconds) * 10**9 + int(nanoseconds)
        at += int(length)
    raise NodeError("changes of a machine: an entry without its time")


def _digest(file: IO[bytes], entry: _Entry) -> str | None:
    """Read the content of an entry, and return its digest where it has content."""
    if entry.kind == "2":
        return hashlib.sha256(os.fsencode(entry.link)).hexdigest()
    found, left = hashlib.sha256(), entry.size
    while left:
        data = _read(file, min(left, _CHUNK))
        found.update(data)
        left -= len(data)
    _read(file, _padded(entry.size) - entry.size)
    return found.hexdigest() if entry.kind == "0" else None


def _skip(file: IO[bytes], entry: _Entry) -> None:
    file.seek(_padded(entry.size), os.SEEK_CUR)

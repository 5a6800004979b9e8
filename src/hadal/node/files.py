"""Files of a box: through its guest, with changes written down first."""

import asyncio
import itertools
import json
import os
import stat
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any, Literal, cast

from hadal.errors import JournalError, SandboxFileError
from hadal.node.blobs import Blobs
from hadal.node.box import Box
from hadal.node.command import refusal_of
from hadal.node.journal import Journal
from hadal.node.wire import Tag, WireError, iterate_fields
from hadal.sandbox.protocol import FileChange
from hadal.sandbox.results import FileStat

__all__ = ["BoxFiles", "read_stats"]

_CHUNK = 256 * 1024
_KINDS: dict[int, str] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}
_EVENTS = {
    0x100: "created", 0x200: "deleted", 0x2: "modified", 0x8: "closed", 0x40: "moved_from",
    0x80: "moved_to", 0x4: "attributes", 0x400: "gone", 0x800: "gone",
}  # fmt: skip
"""Bits of inotify(7)."""


def read_stats(data: bytes) -> list[FileStat]:
    """Read what the guest says about files."""
    found: list[dict[int, bytes]] = []
    for tag, value in iterate_fields(data):
        if tag == Tag.PATH or not found:
            found.append({})
        found[-1][tag] = value
    return [_read_stat(fields) for fields in found if Tag.PATH in fields]


def _read_stat(fields: dict[int, bytes]) -> FileStat:
    def number(tag: Tag) -> int:
        return int.from_bytes(fields.get(tag, b"")[:8], "little")

    target = fields.get(Tag.LINK_TARGET)
    return FileStat(
        path=os.fsdecode(fields[Tag.PATH]),
        kind=cast(Any, _KINDS.get(number(Tag.KIND), "file")),
        size=number(Tag.SIZE),
        mode=number(Tag.MODE),
        uid=number(Tag.UID),
        gid=number(Tag.GID),
        mtime_ns=number(Tag.MTIME),
        ctime_ns=number(Tag.CTIME),
        target=None if target is None else os.fsdecode(target),
    )


class BoxFiles:
    """The operations of one box."""

    def __init__(self, box: Box, journal: Journal, blobs: Blobs) -> None:
        self._box = box
        self._journal = journal
        self._blobs = blobs

    async def stat(self, path: str, *, follow: bool = True) -> FileStat:
        """Describe a file.

        Raises:
            SandboxFileError: As every method here, with the reason of the system.
        """
        return read_stats(await self._box.applet("stat", path, "1" if follow else "0"))[0]

    async def list(self, path: str, *, depth: int = 1) -> list[FileStat]:
        """Describe what is in a directory, and in those in it down to a depth."""
        answer = await self._box.applet("list", path, str(depth))
        return await asyncio.to_thread(read_stats, answer)  # it may be long: others have their turn

    async def read(
        self, path: str, *, offset: int = 0, length: int = 0, user: str | None = None
    ) -> AsyncIterator[bytes]:
        """Yield the content of a file; a length of 0 is all of it."""
        arguments = ("read", path, str(offset), str(length))
        with self._box.open_applet(*arguments, user=user) as running:
            async for chunk in self._box.applet_output(running, arguments):
                yield chunk

    async def pack(self, path: str, *, user: str | None = None) -> AsyncIterator[bytes]:
        """Yield a tree as a tar stream."""
        with self._box.open_applet("pack", path, user=user) as running:
            async for chunk in self._box.applet_output(running, ("pack", path)):
                yield chunk

    async def watch(self, path: str) -> AsyncIterator[bytes]:
        """Yield events as JSON, one a line; the first says that it has begun."""
        rest = b""
        with self._box.open_applet("watch", path) as running:
            async for chunk in self._box.applet_output(running, ("watch", path)):
                rest += chunk
                events, rest = _take_events(rest)
                for event in events:
                    yield json.dumps(event).encode() + b"\n"

    async def write(
        self, path: str, content: AsyncIterable[bytes], *, request_id: str, mode: int | None = None,
        how: Literal["write", "append", "create", "unpack"] = "write", parents: bool = False,
        user: str | None = None,
    ) -> int:  # fmt: skip
        """Write a file, or unpack a tar stream into a directory; return the bytes taken.

        The content is kept first: what a restarted node finds begun, it does again.
        """
        blob = await self._blobs.take(content)
        request = {"path": path, "how": how, "content": blob.digest, "size": blob.size}
        request |= {"mode": mode} if mode is not None else {}
        request |= {"parents": True} if parents else {}
        request |= {"user": user} if user is not None else {}
        await self._journalled("write", request, request_id)
        return blob.size

    async def change(self, change: FileChange) -> None:
        """Change a path."""
        request = change.model_dump(exclude={"request_id"}, exclude_defaults=True)
        await self._journalled("change", request, change.request_id)

    async def _journalled(self, kind: str, request: dict[str, Any], request_id: str) -> None:
        record = self._journal.record_of_request(self._box.id, request_id)
        if record is not None and record.event.state == "done":
            _raise_recorded(record.event.result)
            return
        if record is not None and record.event.state != "begun":
            raise refusal_of(record)
        self._box.touch()
        if record is not None:
            position = record.event.position
        else:
            position = self._box.begin(kind, request, request_id=request_id)
        await self._perform(position, kind, request)

    async def _perform(self, position: int, kind: str, request: dict[str, Any]) -> None:
        try:
            if kind == "write":
                await self._apply_write(request)
            else:
                await self._box.applet(*_change_arguments(request), user=request.get("user"))
        except SandboxFileError as error:
            result = {"errno": error.errno, "filename": error.filename}
            self._journal.end(self._box.id, position, "done", result)
            raise
        self._journal.end(self._box.id, position, "done", {})

    async def repeat_begun(self) -> None:
        """After a restart: changes of files that were begun are done again; that comes to the same."""
        for record in self._journal.begun(self._box.id):
            if record.event.kind not in ("write", "change"):
                continue
            if not _is_repeatable(record.event.kind, record.event.request):
                self._journal.end(self._box.id, record.event.position, "unknown", {})
                continue
            try:
                await self._perform(record.event.position, record.event.kind, record.event.request)
            except SandboxFileError:
                continue  # written down, as without the restart

    async def _apply_write(self, request: dict[str, Any]) -> None:
        path, how = request["path"], request["how"]
        if how == "unpack":
            arguments = ("unpack", path)
        else:
            letters = {"append": "a", "create": "x"}.get(how, "") + (
                "p" if request.get("parents") else ""
            )
            mode = format(request["mode"], "o") if "mode" in request else "-"
            arguments = ("write", path, mode, letters)
        with self._box.open_applet(*arguments, user=request.get("user"), stdin=True) as running:
            feeding = asyncio.get_running_loop().create_task(
                self._feed(running, request["content"])
            )
            try:
                async for _ in self._box.applet_output(running, arguments):
                    pass
            finally:
                feeding.cancel()

    async def _feed(self, running: Any, digest: str) -> None:
        path = self._blobs.path(digest)
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    await running.guest.write(chunk)
        except OSError as error:
            raise JournalError(f"blob {digest[:12]}…: {error.strerror}") from error
        running.guest.end_input()


def _take_events(data: bytes) -> tuple[list[dict[str, str]], bytes]:
    """Read the events that are whole: mask, cookie and name; the first has a mask only."""
    events: list[dict[str, str]] = []
    while data:
        try:
            fields = list(
                itertools.islice(iterate_fields(data), 1 if data[6:14] == bytes(8) else 3)
            )
        except WireError:
            break  # cut off: the rest comes
        length = sum(6 + len(value) for _, value in fields)
        mask = int.from_bytes(fields[0][1], "little")
        name = os.fsdecode(fields[2][1]) if len(fields) == 3 else ""
        if mask and len(fields) < 3:
            break
        kinds = [kind for bit, kind in _EVENTS.items() if mask & bit]
        events += [{"kind": kind, "name": name} for kind in kinds] if mask else [{"kind": "ready"}]
        data = data[length:]
    return events, data


def _change_arguments(request: dict[str, Any]) -> Iterable[str]:
    operation, path, target = request["operation"], request["path"], request.get("target", "")
    recursive = "1" if request.get("recursive") else "0"
    match operation:
        case "remove":
            return ("remove", path, recursive)
        case "mkdir":
            return ("mkdir", path, target or "755", recursive)
        case "symlink":
            return ("symlink", target, path)
        case _:
            return (operation, path, target)


def _is_repeatable(kind: str, request: dict[str, Any]) -> bool:
    """Whether doing it twice comes to the same as doing it once."""
    if kind == "write":
        return request["how"] in ("write", "unpack")
    return request["operation"] in ("chmod", "chown")


def _raise_recorded(result: dict[str, object] | None) -> None:
    errno = (result or {}).get("errno")
    if isinstance(errno, int):
        raise SandboxFileError(errno, str((result or {}).get("filename", "")))

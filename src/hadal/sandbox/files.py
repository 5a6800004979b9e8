"""The files of a box, from outside."""

import errno
import json
import os
import tarfile
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadal.errors import SandboxFileError
from hadal.sandbox.extraction import extract
from hadal.sandbox.results import FileEvent, FileStat

if TYPE_CHECKING:
    from hadal.sandbox.box import AsyncSandbox

__all__ = ["AsyncFiles"]

_CHUNK = 256 * 1024
_PATH_MAX = 4096


class AsyncFiles:
    """Operations on files. Names are text; bytes that are no UTF-8 are as `os.fsdecode` has them.

    Every method raises SandboxFileError with the reason of the system, and SandboxGoneError.
    """

    def __init__(self, box: "AsyncSandbox") -> None:
        self._box = box

    @property
    def _path(self) -> str:
        return f"/v1/boxes/{self._box.id}/files"

    async def read(
        self, path: str, *, offset: int = 0, length: int = 0, user: str | None = None
    ) -> bytes:
        """Return the content of a file, or a part of it; a length of 0 is up to the end."""
        chunks = self.read_chunks(path, offset=offset, length=length, user=user)
        return b"".join([chunk async for chunk in chunks])

    async def read_text(self, path: str, *, user: str | None = None) -> str:
        """Return the content of a file as UTF-8."""
        return (await self.read(path, user=user)).decode("utf-8")

    async def read_chunks(
        self, path: str, *, offset: int = 0, length: int = 0, user: str | None = None
    ) -> AsyncIterator[bytes]:
        """Yield the content of a file of any size."""
        query = _at(path, offset=str(offset), length=str(length))
        query |= {} if user is None else {"user": user}
        async with self._box.client.download(self._path, query=query) as content:
            async for chunk in content.iter_chunked(_CHUNK):
                yield chunk

    async def write(
        self, path: str, data: bytes | str | Path, *, mode: int | None = None, append: bool = False,
        create: bool = False, parents: bool = False, user: str | None = None,
        request_id: str | None = None,
    ) -> None:  # fmt: skip
        """Write a file.

        Args:
            path: In the box.
            data: Content, or the path of a file here.
            mode: Permission bits. Default: as they are, or 0644.
            append: Add to the end.
            create: Fail where it exists.
            parents: Make missing directories above it.
            user: Who writes it.
            request_id: Twice the same writes once. Default: a random one.
        """
        how = "append" if append else "create" if create else "write"
        query = _at(path, how=how)
        query |= {} if mode is None else {"mode": format(mode, "o")}
        query |= {"parents": "1"} if parents else {}
        query |= {} if user is None else {"user": user}
        await self._put(query, data, request_id)

    async def _put(
        self, query: dict[str, str], data: bytes | str | Path, request_id: str | None = None
    ) -> None:
        payload: Any = data.encode() if isinstance(data, str) else data
        if self._box.recorded_write(query, payload):
            return
        query["request_id"] = request_id or uuid.uuid4().hex
        if isinstance(payload, Path):
            with payload.open("rb") as file:
                await self._box.client.request("PUT", self._path, query=query, data=file)
        else:
            await self._box.client.request("PUT", self._path, query=query, data=payload)

    async def stat(self, path: str, *, follow: bool = True) -> FileStat:
        """Describe a file; with `follow`, what a link leads to."""
        query = _at(path, what="stat", follow=str(int(follow)))
        return FileStat(**await self._box.client.request("GET", self._path, query=query))

    async def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        try:
            await self.stat(path)
        except SandboxFileError as error:
            if error.errno in (2, 20):  # ENOENT, ENOTDIR
                return False
            raise
        return True

    async def list(self, path: str, *, depth: int = 1) -> list[FileStat]:
        """Describe what is in a directory, and in those in it down to a depth; sorted by path."""
        query = _at(path, what="list", depth=str(depth))
        body = await self._box.client.request("GET", self._path, query=query)
        return sorted((FileStat(**entry) for entry in body["entries"]), key=lambda f: f.path)

    async def _change(
        self,
        operation: str,
        path: str,
        target: str = "",
        *,
        recursive: bool = False,
        user: str | None = None,
    ) -> None:
        request: dict[str, Any] = {"operation": operation, **_at(path)}
        request |= {"target": target} if target else {}
        request |= {"recursive": True} if recursive else {}
        request |= {} if user is None else {"user": user}
        if self._box.recorded("change", request):
            return
        request["request_id"] = uuid.uuid4().hex
        await self._box.client.request("POST", self._path, body=request)

    async def remove(self, path: str, *, recursive: bool = False, user: str | None = None) -> None:
        """Remove a file or an empty directory; with `recursive` a whole tree."""
        await self._change("remove", path, recursive=recursive, user=user)

    async def rename(self, path: str, target: str, *, user: str | None = None) -> None:
        """Give a file another name, replacing what has it."""
        await self._change("rename", path, target, user=user)

    async def mkdir(
        self, path: str, *, mode: int = 0o755, parents: bool = False, user: str | None = None
    ) -> None:
        """Make a directory; with `parents` also those above it, and none is fine too."""
        await self._change("mkdir", path, format(mode, "o"), recursive=parents, user=user)

    async def chmod(self, path: str, mode: int) -> None:
        """Set permission bits."""
        await self._change("chmod", path, format(mode, "o"))

    async def chown(self, path: str, owner: str) -> None:
        """Set the owner: a user of the image, or `uid:gid`."""
        await self._change("chown", path, owner)

    async def symlink(self, path: str, target: str) -> None:
        """Make a symbolic link at `path` that leads to `target`."""
        await self._change("symlink", path, target)

    async def watch(self, path: str) -> AsyncIterator[FileEvent]:
        """Yield what happens in a directory, or to a file, from now on; ends when nobody asks any more."""
        query = _at(path, what="watch")
        async with self._box.client.download(self._path, query=query) as lines:
            while line := await lines.readline():
                event = json.loads(line)
                if event["kind"] != "ready":
                    yield FileEvent(**event)

    async def repeat(self, kind: str, request: dict[str, Any], source: "AsyncSandbox") -> None:
        """Do a recorded change of files again; content comes from the node of the recorded box."""
        request_id = uuid.uuid4().hex
        if kind == "change":
            await self._box.client.request(
                "POST", self._path, body={**request, "request_id": request_id}
            )
            return
        query = {"path": request["path"], "how": request["how"], "request_id": request_id}
        query |= {"mode": format(request["mode"], "o")} if "mode" in request else {}
        query |= {"parents": "1"} if request.get("parents") else {}
        query |= {"user": request["user"]} if "user" in request else {}
        content = await source.blob(request["content"])
        await self._box.client.request("PUT", self._path, query=query, data=content)

    async def upload(self, local: Path | str, path: str, *, user: str | None = None) -> None:
        """Copy a file to a path, or the content of a directory into a directory that is made."""
        source = Path(local)
        if not source.is_dir():
            await self.write(
                path, source, parents=True, mode=source.stat().st_mode & 0o777, user=user
            )
            return
        await self.mkdir(path, parents=True, user=user)
        with tempfile.NamedTemporaryFile(suffix=".tar") as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
                archive.add(source, arcname=".")
            packed.flush()
            await self.unpack(path, Path(packed.name), user=user)

    async def pack(self, path: str, *, user: str | None = None) -> AsyncIterator[bytes]:
        """Yield a file, or what is in a directory, as a tar stream."""
        query = _at(path, what="tar") | ({} if user is None else {"user": user})
        async with self._box.client.download(self._path, query=query) as content:
            async for chunk in content.iter_chunked(_CHUNK):
                yield chunk

    async def unpack(self, path: str, data: bytes | Path, *, user: str | None = None) -> None:
        """Unpack a tar stream, or a tar file here, into a directory that exists."""
        query = _at(path, how="unpack") | ({} if user is None else {"user": user})
        await self._put(query, data)

    async def download(self, path: str, local: Path | str) -> None:
        """Copy a file, or the content of a directory, to a path here.

        What comes from a box is not trusted: links are kept where they stay inside, and never followed.

        Raises:
            UnsafeFileError: There are links that lead outside, devices and the like; or the archive that
                comes out of the box is no good.
        """
        target = Path(local)
        if (await self.stat(path)).kind != "directory":
            with target.open("wb") as file:
                async for chunk in self.read_chunks(path):
                    file.write(chunk)
            return
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(target)) as file:
            async for chunk in self.pack(path):
                file.write(chunk)
            file.seek(0)
            extract(file, target)


def _at(path: str, **more: str) -> dict[str, str]:
    """Return a request about a path, which has a length that Linux takes (PATH_MAX) and HTTP, too.

    Raises:
        SandboxFileError: It is longer.
    """
    if len(os.fsencode(path)) >= _PATH_MAX:
        raise SandboxFileError(errno.ENAMETOOLONG, f"{path[:80]}…")
    return {"path": path, **more}

"""Files of a box."""

import dataclasses
import re
from typing import Any

from aiohttp import ClientConnectionError, web

from hadal.errors import ConfigError, HadalError
from hadal.node.files import BoxFiles
from hadal.node.routes.http import NODE, box_of, number, query, read_body
from hadal.sandbox.protocol import FileChange

__all__ = ["routes"]

routes = web.RouteTableDef()


@routes.get("/v1/boxes/{box}/files")
async def read(request: web.Request) -> web.StreamResponse:
    """GET /v1/boxes/{box}/files?path=: content, or with what=stat|list|tar something else."""
    files, path = _files(request), query(request, "path")
    user = request.query.get("user")
    match request.query.get("what", "content"):
        case "content":
            offset, length = number(request, "offset", 0), number(request, "length", 0)
            return await _stream(request, files.read(path, offset=offset, length=length, user=user))
        case "tar":
            return await _stream(request, files.pack(path, user=user))
        case "watch":
            return await _stream(request, files.watch(path))
        case "stat":
            follow = request.query.get("follow", "1") != "0"
            return web.json_response(dataclasses.asdict(await files.stat(path, follow=follow)))
        case "list":
            found = await files.list(path, depth=number(request, "depth", 1))
            return web.json_response({"entries": [dataclasses.asdict(f) for f in found]})
        case other:
            raise ConfigError(f"what must be content, tar, watch, stat or list, got {other!r}")


@routes.put("/v1/boxes/{box}/files")
async def write(request: web.Request) -> web.Response:
    """PUT /v1/boxes/{box}/files?path=&how=write|append|create|unpack: the body is the content."""
    how = request.query.get("how", "write")
    if how not in ("write", "append", "create", "unpack"):
        raise ConfigError(f"how must be write, append, create or unpack, got {how!r}")
    mode = request.query.get("mode")
    if mode is not None and not re.fullmatch("[0-7]{1,5}", mode):
        raise ConfigError(f"mode must be permission bits in octal, got {mode!r:.100}")
    size = await _files(request).write(
        query(request, "path"),
        request.content.iter_chunked(256 * 1024),
        request_id=query(request, "request_id"),
        mode=None if mode is None else int(mode, 8),
        how=how,
        parents=request.query.get("parents") == "1",
        user=request.query.get("user"),
    )
    return web.json_response({"size": size})


@routes.post("/v1/boxes/{box}/files")
async def change(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/files."""
    await _files(request).change(await read_body(request, FileChange))
    return web.json_response({})


def _files(request: web.Request) -> BoxFiles:
    node = request.app[NODE]
    return BoxFiles(box_of(request), node.journal, node.blobs)


async def _stream(request: web.Request, chunks: Any) -> web.StreamResponse:
    """Send chunks as they come; an error before the first one is still a proper answer.

    Later ones cut the connection off, so that nobody takes half a file for a whole one.
    """
    first = await anext(chunks, None)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    try:
        if first is not None:
            await response.write(first)
            async for chunk in chunks:
                await response.write(chunk)
        await response.write_eof()
    except (HadalError, ConnectionError, ClientConnectionError):  # ours, or theirs
        if request.transport is not None:
            request.transport.abort()
    return response

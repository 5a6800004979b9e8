"""The node itself: what it is and holds, and its end."""

import os
import time

from aiohttp import web

from hadal import __version__
from hadal.errors import ConfigError, NodeAuthError
from hadal.node.openapi import document
from hadal.node.routes.http import NODE, STOP, read_body
from hadal.sandbox.protocol import StopRequest

__all__ = ["routes"]

routes = web.RouteTableDef()


@routes.get(r"/v1/blobs/{digest:[0-9a-f]{64}}")
async def blob(request: web.Request) -> web.StreamResponse:
    """GET /v1/blobs/{digest}: content that the log names."""
    digest = request.match_info["digest"]
    if not request.app[NODE].blobs.path(digest).exists():
        raise ConfigError(f"the node has no content {digest[:12]}…")
    return web.Response(body=request.app[NODE].blobs.read(digest))


@routes.get("/v1/node")
async def status(request: web.Request) -> web.Response:
    """GET /v1/node."""
    node = request.app[NODE]
    return web.json_response(
        {
            "name": node.config.name,
            "version": __version__,
            "pid": os.getpid(),
            "state": str(node.config.state),
            "boxes": len(node.boxes),
            "max_boxes": node.config.max_boxes,
            "memory_mb": node.memory_mb,
            "max_memory_mb": node.config.memory_mb,
            "cgroups": node.cgroups.layout,
            "uptime_s": (time.time_ns() - node.started_ns) / 1e9,
        }
    )


@routes.post("/v1/node/stop")
async def stop(request: web.Request) -> web.Response:
    """POST /v1/node/stop: the daemon ends, after this answer."""
    body = await read_body(request, StopRequest)
    stop = request.app[STOP]
    if stop is None:
        raise NodeAuthError(
            "a node is not stopped over the network", hint="`hadal node stop` on its machine"
        )
    stop(body.end_boxes)
    return web.json_response({})


@routes.get("/v1/openapi.json")
async def description(request: web.Request) -> web.Response:
    """GET /v1/openapi.json."""
    return web.json_response(document())


@routes.get("/healthz")
async def health(request: web.Request) -> web.Response:
    """GET /healthz."""
    return web.Response(text="ok")

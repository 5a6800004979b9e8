"""Boxes: made, looked at, forked, kept, paused, ended."""

import asyncio
import base64
import dataclasses
import json
from typing import Any

from aiohttp import web

from hadal.errors import GoneCause, UnsupportedError
from hadal.node.changes import list_changes
from hadal.node.journal import Record
from hadal.node.machines.changes import list_layer, packed_changes
from hadal.node.machines.disk_images import is_disk_image
from hadal.node.routes.http import NODE, box_of, number, read_body
from hadal.node.screens import give_input, read_console, take_screenshot
from hadal.node.usage import usage_of
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.protocol import (
    CallRequest,
    CreateRequest,
    InputRequest,
    NetworkRequest,
    PauseRequest,
    SnapshotRequest,
)

__all__ = ["routes"]

routes = web.RouteTableDef()


@routes.post("/v1/boxes")
async def create(request: web.Request) -> web.Response:
    """POST /v1/boxes."""
    node = request.app[NODE]
    box = await node.create(await read_body(request, CreateRequest))
    return web.json_response(dataclasses.asdict(node.info(box.id)), status=201)


@routes.get("/v1/boxes")
async def boxes(request: web.Request) -> web.Response:
    """GET /v1/boxes."""
    node = request.app[NODE]
    told = [box for box in list(node.boxes) if not node.spares.has(box)]
    found = [dataclasses.asdict(node.info(box)) for box in told]
    return web.json_response({"boxes": found})


@routes.get("/v1/boxes/{box}")
async def info(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}."""
    info = request.app[NODE].info(request.match_info["box"])
    return web.json_response(dataclasses.asdict(info))


@routes.delete("/v1/boxes/{box}")
async def remove(request: web.Request) -> web.Response:
    """DELETE /v1/boxes/{box}: also of one that is gone already."""
    ending = request.app[NODE].begin_end(request.match_info["box"], GoneCause.KILLED)
    return web.json_response({"ended": ending is not None})


@routes.get("/v1/boxes/{box}/log")
async def log(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}/log: records behind a position."""
    node = request.app[NODE]
    box = request.match_info["box"]
    node.info(box)
    after, limit = number(request, "after", 0), min(number(request, "limit", 1000), 10_000)
    records = node.journal.records(box, after=after, limit=limit)
    return web.json_response({"records": [_record_body(r) for r in records]})


@routes.post("/v1/boxes/{box}/call")
async def call(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/call."""
    body = await read_body(request, CallRequest)
    return web.json_response(await request.app[NODE].calls.call(box_of(request).id, body))


@routes.post("/v1/boxes/{box}/fork")
async def fork(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/fork."""
    node = request.app[NODE]
    body = await read_body(request, SnapshotRequest)
    made = await node.forks.make(box_of(request).id, body.count, body.request_id)
    return web.json_response({"boxes": [dataclasses.asdict(node.info(b.id)) for b in made]})


@routes.post("/v1/boxes/{box}/snapshot")
async def snapshot(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/snapshot."""
    body = await read_body(request, SnapshotRequest)
    node = request.app[NODE]
    box = box_of(request)
    reference = await node.snapshots.take(box, body.name, body.request_id, kind=body.kind)
    return web.json_response({"reference": reference})


@routes.get("/v1/machines/kept")
async def kept(request: web.Request) -> web.Response:
    """GET /v1/machines/kept: snapshots of machines with their memory."""
    found = await asyncio.to_thread(request.app[NODE].machines.kept.list)
    return web.json_response({"machines": [dataclasses.asdict(one) for one in found]})


@routes.delete("/v1/machines/kept/{reference}")
async def forget(request: web.Request) -> web.Response:
    """DELETE /v1/machines/kept/{reference}."""
    kept = request.app[NODE].machines.kept
    await asyncio.to_thread(kept.remove, request.match_info["reference"])
    return web.json_response({})


@routes.put("/v1/boxes/{box}/network")
async def set_network(request: web.Request) -> web.Response:
    """PUT /v1/boxes/{box}/network."""
    body = await read_body(request, NetworkRequest)
    policy = NetworkPolicy.from_json(body.policy)
    await request.app[NODE].set_network(box_of(request), policy, body.request_id)
    return web.json_response({})


@routes.get("/v1/boxes/{box}/network")
async def network(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}/network: what it sent, received, and was denied."""
    found = await request.app[NODE].networks.statistics(box_of(request).id)
    return web.json_response(json.loads(json.dumps(dataclasses.asdict(found), default=str)))


@routes.get("/v1/boxes/{box}/screenshot")
async def screenshot(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}/screenshot: a picture in PNG."""
    return web.Response(body=await take_screenshot(box_of(request)), content_type="image/png")


@routes.get("/v1/boxes/{box}/console")
async def console(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}/console: what it has said last, as it came."""
    body = read_console(box_of(request))
    return web.Response(body=body, content_type="application/octet-stream")


@routes.post("/v1/boxes/{box}/input")
async def give(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/input."""
    body = await read_body(request, InputRequest)
    await give_input(request.app[NODE].journal, box_of(request), body)
    return web.json_response({})


@routes.post("/v1/boxes/{box}/pause")
async def pause(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/pause."""
    box, said = box_of(request), PauseRequest()
    if request.can_read_body:
        said = await read_body(request, PauseRequest)
    if said.reclaim:
        await request.app[NODE].sleep.begin(box)
    else:
        await box.pause()
    return web.json_response({})


@routes.post("/v1/boxes/{box}/resume")
async def resume(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/resume."""
    box_of(request).resume()
    return web.json_response({})


@routes.get("/v1/boxes/{box}/changes")
async def changes(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}/changes: what differs from the image."""
    box, limit = box_of(request), number(request, "limit", 0) or None
    content = request.query.get("content", "1") != "0"
    root = request.app[NODE].base_of(box)[0].name
    if is_disk_image(root):
        raise UnsupportedError(
            f"nobody knows what box {box.id} has changed of {root}: it is no image of files",
            hint="look at its files, or keep its disk: snapshot()",
        )
    if box.machine is not None:
        async with packed_changes(box) as archive:
            most = box.spec.inodes
            found = await asyncio.to_thread(
                list_layer, archive, most=most, content=content, limit=limit
            )
    else:
        with request.app[NODE].disks.open(box.disk) as disk:
            upper = disk / "upper"
            found = await asyncio.to_thread(list_changes, upper, content=content, limit=limit)
    return web.json_response({"changes": [dataclasses.asdict(change) for change in found]})


@routes.get("/v1/boxes/{box}/usage")
async def usage(request: web.Request) -> web.Response:
    """GET /v1/boxes/{box}/usage."""
    return web.json_response(await usage_of(box_of(request), request.app[NODE].disks))


def _record_body(record: Record) -> dict[str, Any]:
    body = {f.name: getattr(record.event, f.name) for f in dataclasses.fields(record.event)}
    body["request_id"] = record.request_id
    for name, data in (("stdout", record.stdout), ("stderr", record.stderr)):
        body[name] = base64.b64encode(data).decode()
    return body

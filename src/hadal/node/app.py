"""The node over HTTP: what docs/formats/node-api.md describes, on a Unix socket or a port."""

import asyncio
import base64
import contextlib
import dataclasses
import errno as errno_module
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from aiohttp import ClientConnectionError, WSMsgType, web
from pydantic import BaseModel, ValidationError

from hadal import __version__
from hadal.errors import (
    CommandRefusedError,
    ConfigError,
    GoneCause,
    HadalError,
    ImageError,
    NoCapacityError,
    NodeAuthError,
    SandboxFileError,
    SandboxGoneError,
    UnknownOutcomeError,
    UnsupportedError,
)
from hadal.node.box import Box, Command
from hadal.node.changes import list_changes
from hadal.node.files import BoxFiles
from hadal.node.guest import GuestLostError
from hadal.node.journal import Record
from hadal.node.node import Node
from hadal.node.openapi import document
from hadal.node.wire import Tag, decode_fields
from hadal.sandbox.client import ERROR_DETAILS
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.protocol import (
    CallRequest,
    CommandRequest,
    CreateRequest,
    FileChange,
    NetworkRequest,
    SignalRequest,
    SnapshotRequest,
    StopRequest,
)
from hadal.sandbox.results import ExecResult

__all__ = ["build_node_app"]

logger = logging.getLogger(__name__)
_NODE = web.AppKey("node", Node)
_STOP: web.AppKey[Callable[[bool], None] | None] = web.AppKey("stop")
_STATUS: list[tuple[type[HadalError], int]] = [
    (NodeAuthError, 401),
    (SandboxGoneError, 410),
    (NoCapacityError, 503),
    (SandboxFileError, 422),
    (CommandRefusedError, 422),
    (UnknownOutcomeError, 409),
    (ImageError, 422),
    (UnsupportedError, 501),
    (ConfigError, 400),
]
Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_body(error: HadalError) -> dict[str, Any]:
    """Return an error as JSON, from which the SDK makes it again."""
    values = {name: getattr(error, name, None) for name in ERROR_DETAILS}
    details = {name: value for name, value in values.items() if value is not None}
    return {"code": error.code, "message": error.message, "hint": error.hint, "details": details}


def _status(error: HadalError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HadalError as error:
        return web.json_response(error_body(error), status=_status(error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        body = error_body(ConfigError(f"{request.method} {request.path}: {error.reason}"))
        return web.json_response(body, status=error.status)
    except (RecursionError, UnicodeError) as error:
        body = error_body(
            ConfigError(f"a request that is nested too deep or no text: {error!r:.200}")
        )
        return web.json_response(body, status=400)
    except Exception:
        logger.exception("request failed", extra={"method": request.method, "path": request.path})
        body = {
            "code": "node",
            "message": "the node failed; its log says how",
            "hint": None,
            "details": {},
        }
        return web.json_response(body, status=500)


def _authorize(keys: frozenset[str]) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = (
            request.headers.get("Authorization", "")
            .removeprefix("Bearer ")
            .encode(errors="replace")
        )
        if request.path != "/healthz" and not any(
            hmac.compare_digest(given, k.encode()) for k in keys
        ):
            raise NodeAuthError(
                "the node does not know this API key", hint="set HADAL_NODE_KEY, or pass key="
            )
        return await handler(request)

    return check


async def _body(request: web.Request, kind: type[Body]) -> Body:
    try:
        return kind.model_validate(json.loads(await request.read()))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{request.path}: the body is no JSON: {error}") from error
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{request.path}: {where}: {first['msg']}, got {first['input']!r:.500}"
        ) from error


def _result_body(result: ExecResult) -> dict[str, Any]:
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    for name in ("stdout_bytes", "stderr_bytes"):
        fields[name] = base64.b64encode(fields[name]).decode()
    return fields


def _record_body(record: Record) -> dict[str, Any]:
    body = {f.name: getattr(record.event, f.name) for f in dataclasses.fields(record.event)}
    body["request_id"] = record.request_id
    for name, data in (("stdout", record.stdout), ("stderr", record.stderr)):
        body[name] = base64.b64encode(data).decode()
    return body


def _box(request: web.Request) -> Box:
    return request.app[_NODE].get(request.match_info["box"])


def _files(request: web.Request) -> BoxFiles:
    node = request.app[_NODE]
    return BoxFiles(_box(request), node.journal, node.blobs)


def _parameters(request: web.Request) -> dict[str, str]:
    """Return the query. Names of files are bytes: what is not UTF-8 comes through as it is."""
    raw = request.rel_url.raw_query_string
    return dict(parse_qsl(raw, keep_blank_values=True, errors="surrogateescape"))


def _query(request: web.Request, name: str) -> str:
    value = _parameters(request).get(name)
    if value is None:
        raise ConfigError(f"{request.path}: the query has no {name}")
    return value


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(f"{request.path}: {name} must be a number from 0 on, got {text!r:.100}")
    return int(text)


class Routes:
    """The handlers, by what they are about."""

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/boxes."""
        node = request.app[_NODE]
        box = await node.create(await _body(request, CreateRequest))
        return web.json_response(dataclasses.asdict(node.info(box.id)), status=201)

    async def boxes(self, request: web.Request) -> web.Response:
        """GET /v1/boxes."""
        node = request.app[_NODE]
        found = [dataclasses.asdict(node.info(box)) for box in list(node.boxes)]
        return web.json_response({"boxes": found})

    async def info(self, request: web.Request) -> web.Response:
        """GET /v1/boxes/{box}."""
        info = request.app[_NODE].info(request.match_info["box"])
        return web.json_response(dataclasses.asdict(info))

    async def remove(self, request: web.Request) -> web.Response:
        """DELETE /v1/boxes/{box}: also of one that is gone already."""
        ending = request.app[_NODE].begin_end(request.match_info["box"], GoneCause.KILLED)
        return web.json_response({"ended": ending is not None})

    async def log(self, request: web.Request) -> web.Response:
        """GET /v1/boxes/{box}/log: records behind a position."""
        node = request.app[_NODE]
        box = request.match_info["box"]
        node.info(box)
        after, limit = _number(request, "after", 0), min(_number(request, "limit", 1000), 10_000)
        records = node.journal.records(box, after=after, limit=limit)
        return web.json_response({"records": [_record_body(r) for r in records]})

    async def call(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/call."""
        body = await _body(request, CallRequest)
        return web.json_response(await request.app[_NODE].calls.call(_box(request).id, body))

    async def fork(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/fork."""
        node = request.app[_NODE]
        body = await _body(request, SnapshotRequest)
        made = await node.forks.make(_box(request).id, body.count, body.request_id)
        return web.json_response({"boxes": [dataclasses.asdict(node.info(b.id)) for b in made]})

    async def snapshot(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/snapshot."""
        body = await _body(request, SnapshotRequest)
        node = request.app[_NODE]
        reference = await node.snapshots.take(_box(request), body.name, body.request_id)
        return web.json_response({"reference": reference})

    async def set_network(self, request: web.Request) -> web.Response:
        """PUT /v1/boxes/{box}/network."""
        body = await _body(request, NetworkRequest)
        policy = NetworkPolicy.from_json(body.policy)
        await request.app[_NODE].set_network(_box(request), policy, body.request_id)
        return web.json_response({})

    async def network(self, request: web.Request) -> web.Response:
        """GET /v1/boxes/{box}/network: what it sent, received, and was denied."""
        found = await request.app[_NODE].networks.statistics(_box(request).id)
        return web.json_response(json.loads(json.dumps(dataclasses.asdict(found), default=str)))

    async def pause(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/pause."""
        await _box(request).pause()
        return web.json_response({})

    async def resume(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/resume."""
        _box(request).resume()
        return web.json_response({})

    async def changes(self, request: web.Request) -> web.Response:
        """GET /v1/boxes/{box}/changes: what differs from the image."""
        box, limit = _box(request), _number(request, "limit", 0) or None
        content = request.query.get("content", "1") != "0"
        with request.app[_NODE].disks.open(box.disk) as disk:
            found = await asyncio.to_thread(
                list_changes, disk / "upper", content=content, limit=limit
            )
        return web.json_response({"changes": [dataclasses.asdict(change) for change in found]})

    async def usage(self, request: web.Request) -> web.Response:
        """GET /v1/boxes/{box}/usage."""
        box = _box(request)
        return web.json_response(
            {
                "memory_bytes": box.cgroup.memory_bytes(),
                "memory_limit_bytes": box.spec.memory_mb << 20,
                "cpu_s": box.cgroup.cpu_s(),
                "pids": box.cgroup.pids() - 1,
                "disk_bytes": request.app[_NODE].disks.used_bytes(box.disk),
                "oom_kills": box.cgroup.oom_kills(),
            }
        )

    async def blob(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/blobs/{digest}: content that the log names."""
        digest = request.match_info["digest"]
        if not request.app[_NODE].blobs.path(digest).exists():
            raise ConfigError(f"the node has no content {digest[:12]}…")
        return web.Response(body=request.app[_NODE].blobs.read(digest))

    # --- commands ---

    async def run(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/commands."""
        body = await _body(request, CommandRequest)
        if (body.argv is None) == (body.shell is None):
            raise ConfigError("a command needs either argv or shell")
        box = _box(request)
        command = await box.start(body)
        if body.wait:
            return web.json_response(_result_body(await asyncio.shield(command.result)))
        if command.guest is not None:
            await asyncio.wait(
                [command.guest.started, command.result], return_when="FIRST_COMPLETED"
            )
            if command.result.done():
                with contextlib.suppress(GuestLostError):
                    await command.result
        return web.json_response({"id": command.position})

    def _command(self, request: web.Request) -> Command:
        box = _box(request)
        position = int(request.match_info["command"])
        for command in box.commands.values():
            if command.position == position:
                return command
        journal = request.app[_NODE].journal
        for record in journal.records(box.id, after=position - 1, limit=1):
            if record.event.position == position and record.event.kind == "command":
                return box.recorded(record)
        raise ConfigError(f"box {box.id} has no command {position}", hint="its log has them")

    async def signal(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/commands/{command}/signal."""
        body = await _body(request, SignalRequest)
        command = self._command(request)
        if command.guest is not None and not command.result.done():
            command.guest.signal(body.signal)
        return web.json_response({})

    async def attach(self, request: web.Request) -> web.WebSocketResponse:
        """GET /v1/boxes/{box}/commands/{command}/attach, upgraded: output from offsets on, input, the end.

        To the client: binary frames `u8 stream | u64 offset | data`, then one text frame with the result
        or the error. From it: binary frames of input; text frames {"input_end": true},
        {"signal": n}, {"resize": [rows, columns]}.
        """
        command = self._command(request)
        offsets = _number(request, "stdout", 0), _number(request, "stderr", 0)
        socket = web.WebSocketResponse(heartbeat=20, max_msg_size=1 << 20)
        await socket.prepare(request)
        sending = asyncio.get_running_loop().create_task(
            self._send_output(socket, command, offsets)
        )
        try:
            async for message in socket:
                if message.type == WSMsgType.BINARY and command.guest is not None:
                    with contextlib.suppress(GuestLostError):
                        await command.guest.write(message.data)
                elif message.type == WSMsgType.TEXT and command.guest is not None:
                    _control(command, message.data)
        finally:
            sending.cancel()
        return socket

    async def _send_output(
        self, socket: web.WebSocketResponse, command: Command, offsets: tuple[int, int]
    ) -> None:
        async for stream, offset, data in command.output.follow(*offsets):
            await socket.send_bytes(bytes([stream]) + offset.to_bytes(8, "little") + data)
        try:
            result = await asyncio.shield(command.result)
            end = {
                "result": _result_body(
                    dataclasses.replace(result, stdout_bytes=b"", stderr_bytes=b"")
                )
            }
        except HadalError as error:
            end = {"error": error_body(error)}
        await socket.send_json(end)
        await socket.close()

    async def port(self, request: web.Request) -> web.WebSocketResponse:
        """GET /v1/boxes/{box}/ports/{port}?host=, upgraded: a connection to a port in the box.

        Binary frames both ways; {"input_end": true} closes the box's side of it for reading.
        """
        box, number = _box(request), request.match_info["port"]
        host = _parameters(request).get("host", "127.0.0.1")
        with box.open_applet("connect", host, number, stdin=True) as running:
            await _connected(running, f"{host}:{number}")
            socket = web.WebSocketResponse(max_msg_size=1 << 20)
            await socket.prepare(request)
            sending = asyncio.get_running_loop().create_task(self._send_port(socket, running))
            try:
                async for message in socket:
                    if message.type == WSMsgType.BINARY:
                        await running.guest.write(message.data)
                    elif message.type == WSMsgType.TEXT:
                        _control(running, message.data)
            finally:
                sending.cancel()
        return socket

    async def _send_port(self, socket: web.WebSocketResponse, running: Command) -> None:
        async for stream, _, data in running.output.follow():
            if stream == 1:
                await socket.send_bytes(data)
        await socket.close()

    # --- files ---

    async def read(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/boxes/{box}/files?path=: content, or with what=stat|list|tar something else."""
        files, path = _files(request), _query(request, "path")
        user = request.query.get("user")
        match request.query.get("what", "content"):
            case "content":
                offset, length = _number(request, "offset", 0), _number(request, "length", 0)
                return await _stream(
                    request, files.read(path, offset=offset, length=length, user=user)
                )
            case "tar":
                return await _stream(request, files.pack(path, user=user))
            case "watch":
                return await _stream(request, files.watch(path))
            case "stat":
                follow = request.query.get("follow", "1") != "0"
                return web.json_response(dataclasses.asdict(await files.stat(path, follow=follow)))
            case "list":
                found = await files.list(path, depth=_number(request, "depth", 1))
                return web.json_response({"entries": [dataclasses.asdict(f) for f in found]})
            case other:
                raise ConfigError(f"what must be content, tar, watch, stat or list, got {other!r}")

    async def write(self, request: web.Request) -> web.Response:
        """PUT /v1/boxes/{box}/files?path=&how=write|append|create|unpack: the body is the content."""
        how = request.query.get("how", "write")
        if how not in ("write", "append", "create", "unpack"):
            raise ConfigError(f"how must be write, append, create or unpack, got {how!r}")
        mode = request.query.get("mode")
        if mode is not None and not re.fullmatch("[0-7]{1,5}", mode):
            raise ConfigError(f"mode must be permission bits in octal, got {mode!r:.100}")
        size = await _files(request).write(
            _query(request, "path"),
            request.content.iter_chunked(256 * 1024),
            request_id=_query(request, "request_id"),
            mode=None if mode is None else int(mode, 8),
            how=how,
            parents=request.query.get("parents") == "1",
            user=request.query.get("user"),
        )
        return web.json_response({"size": size})

    async def change(self, request: web.Request) -> web.Response:
        """POST /v1/boxes/{box}/files."""
        await _files(request).change(await _body(request, FileChange))
        return web.json_response({})

    # --- the node ---

    async def status(self, request: web.Request) -> web.Response:
        """GET /v1/node."""
        node = request.app[_NODE]
        return web.json_response(
            {
                "name": node.config.name,
                "version": __version__,
                "pid": os.getpid(),
                "state": str(node.config.state),
                "boxes": len(node.boxes),
                "max_boxes": node.config.max_boxes,
                "cgroups": node.cgroups.layout,
                "uptime_s": (time.time_ns() - node.started_ns) / 1e9,
            }
        )

    async def stop(self, request: web.Request) -> web.Response:
        """POST /v1/node/stop: the daemon ends, after this answer."""
        body = await _body(request, StopRequest)
        stop = request.app[_STOP]
        if stop is None:
            raise NodeAuthError(
                "a node is not stopped over the network", hint="`hadal node stop` on its machine"
            )
        stop(body.end_boxes)
        return web.json_response({})

    async def description(self, request: web.Request) -> web.Response:
        """GET /v1/openapi.json."""
        return web.json_response(document())

    async def health(self, request: web.Request) -> web.Response:
        """GET /healthz."""
        return web.Response(text="ok")


async def _connected(running: Command, where: str) -> None:
    """Wait until a port has answered: then something is on standard error, and its first number is 0."""
    async for stream, _, data in running.output.follow():
        errno = int.from_bytes(decode_fields(data)[Tag.ERRNO][:4], "little") if stream == 2 else 0
        if errno:
            raise SandboxFileError(errno, where)
        return
    raise SandboxFileError(errno_module.ECONNREFUSED, where)


def _control(command: Command, text: str) -> None:
    """Do what a text frame asks for; one that means nothing is logged and passed over."""
    assert command.guest is not None
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    match message:
        case {"input_end": True}:
            command.guest.end_input()
        case {"signal": int(number)} if 1 <= number <= 64:
            command.guest.signal(number)
        case {"resize": [int(rows), int(columns)]} if (
            0 <= min(rows, columns) <= max(rows, columns) < 1 << 16
        ):
            command.guest.resize(rows, columns)
        case _:
            logger.warning("a message that means nothing: %.100s", text)


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


def build_node_app(
    node: Node,
    *,
    keys: frozenset[str] = frozenset(),
    stop: Callable[[bool], None] | None = None,
) -> web.Application:
    """Return the application of a node.

    Args:
        node: The node.
        keys: API keys, of which every request needs one; none for none.
        stop: Ends the daemon, with or without its boxes; None where callers may not.
    """
    middlewares = [_errors, _authorize(keys)] if keys else [_errors]
    app = web.Application(middlewares=middlewares, client_max_size=64 << 20)
    app[_NODE] = node
    app[_STOP] = stop
    routes = Routes()
    box = "/v1/boxes/{box}"
    app.router.add_post("/v1/boxes", routes.create)
    app.router.add_get("/v1/boxes", routes.boxes)
    app.router.add_get(box, routes.info)
    app.router.add_delete(box, routes.remove)
    app.router.add_get(box + "/log", routes.log)
    app.router.add_get(box + "/usage", routes.usage)
    app.router.add_get(box + "/changes", routes.changes)
    app.router.add_get(box + r"/ports/{port:[0-9]{1,5}}", routes.port)
    app.router.add_post(box + "/call", routes.call)
    app.router.add_post(box + "/fork", routes.fork)
    app.router.add_post(box + "/snapshot", routes.snapshot)
    app.router.add_put(box + "/network", routes.set_network)
    app.router.add_get(box + "/network", routes.network)
    app.router.add_post(box + "/pause", routes.pause)
    app.router.add_post(box + "/resume", routes.resume)
    app.router.add_post(box + "/commands", routes.run)
    app.router.add_post(box + r"/commands/{command:[0-9]{1,18}}/signal", routes.signal)
    app.router.add_get(box + r"/commands/{command:[0-9]{1,18}}/attach", routes.attach)
    app.router.add_get(box + "/files", routes.read)
    app.router.add_put(box + "/files", routes.write)
    app.router.add_post(box + "/files", routes.change)
    app.router.add_get(r"/v1/blobs/{digest:[0-9a-f]{64}}", routes.blob)
    app.router.add_get("/v1/node", routes.status)
    app.router.add_post("/v1/node/stop", routes.stop)
    app.router.add_get("/v1/openapi.json", routes.description)
    app.router.add_get("/healthz", routes.health)
    return app

"""Commands: begun, attached to, signalled."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
from typing import Any

from aiohttp import WSMsgType, web

from hadal.errors import ConfigError, HadalError, SandboxGoneError
from hadal.node.box import Box
from hadal.node.command import Command
from hadal.node.guest import GuestLostError
from hadal.node.routes.http import NODE, box_of, error_body, number, read_body
from hadal.sandbox.protocol import CommandRequest, SignalRequest
from hadal.sandbox.results import ExecResult

__all__ = ["obey", "routes"]

logger = logging.getLogger(__name__)
routes = web.RouteTableDef()


@routes.post("/v1/boxes/{box}/commands")
async def run(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/commands."""
    body = await read_body(request, CommandRequest)
    if (body.argv is None) == (body.shell is None):
        raise ConfigError("a command needs either argv or shell")
    box = box_of(request)
    command = await box.start(body)
    if body.wait:
        return web.json_response(_result_body(await asyncio.shield(command.result)))
    if command.guest is not None:
        await asyncio.wait([command.guest.started, command.result], return_when="FIRST_COMPLETED")
        if command.result.done():
            with contextlib.suppress(GuestLostError):
                await command.result
    return web.json_response({"id": command.position})


def _command(request: web.Request) -> Command:
    """Return a command; a box in which it runs is used by whoever asks for it."""
    box = box_of(request)
    command = _find_command(request, box)
    if not command.result.done():
        box.touch()
    return command


def _find_command(request: web.Request, box: Box) -> Command:
    position = int(request.match_info["command"])
    for command in box.commands.values():
        if command.position == position:
            return command
    journal = request.app[NODE].journal
    for record in journal.records(box.id, after=position - 1, limit=1):
        if record.event.position == position and record.event.kind == "command":
            return box.recorded(record)
    raise ConfigError(f"box {box.id} has no command {position}", hint="its log has them")


@routes.post(r"/v1/boxes/{box}/commands/{command:[0-9]{1,18}}/signal")
async def signal(request: web.Request) -> web.Response:
    """POST /v1/boxes/{box}/commands/{command}/signal."""
    body = await read_body(request, SignalRequest)
    command = _command(request)
    if command.guest is not None and not command.result.done():
        command.guest.signal(body.signal)
    return web.json_response({})


@routes.get(r"/v1/boxes/{box}/commands/{command:[0-9]{1,18}}/attach")
async def attach(request: web.Request) -> web.WebSocketResponse:
    """GET /v1/boxes/{box}/commands/{command}/attach, upgraded: output from offsets on, input, the end.

    To the client: binary frames `u8 stream | u64 offset | data`, then one text frame with the result
    or the error. From it: binary frames of input; text frames {"input_end": true},
    {"signal": n}, {"resize": [rows, columns]}.
    """
    box, command = box_of(request), _command(request)
    offsets = number(request, "stdout", 0), number(request, "stderr", 0)
    socket = web.WebSocketResponse(heartbeat=20, max_msg_size=1 << 20)
    await socket.prepare(request)
    sending = asyncio.get_running_loop().create_task(_send_output(socket, command, offsets))
    try:
        async for message in socket:
            try:
                box.touch()
                if message.type == WSMsgType.BINARY and command.guest is not None:
                    await command.guest.write(message.data)
                elif message.type == WSMsgType.TEXT and command.guest is not None:
                    obey(command, message.data)
            except (GuestLostError, SandboxGoneError):
                pass  # the result says so
            except HadalError as error:  # it sleeps, and cannot be woken now
                await socket.send_json({"error": error_body(error)})
                await socket.close()
    finally:
        sending.cancel()
    return socket


async def _send_output(
    socket: web.WebSocketResponse, command: Command, offsets: tuple[int, int]
) -> None:
    async for stream, offset, data in command.output.follow(*offsets):
        await socket.send_bytes(bytes([stream]) + offset.to_bytes(8, "little") + data)
    try:
        result = await asyncio.shield(command.result)
        end = {
            "result": _result_body(dataclasses.replace(result, stdout_bytes=b"", stderr_bytes=b""))
        }
    except HadalError as error:
        end = {"error": error_body(error)}
    await socket.send_json(end)
    await socket.close()


def obey(command: Command, text: str) -> None:
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


def _result_body(result: ExecResult) -> dict[str, Any]:
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    for name in ("stdout_bytes", "stderr_bytes"):
        fields[name] = base64.b64encode(fields[name]).decode()
    return fields

"""Connections to ports in a box."""

import asyncio
import errno as errno_module

from aiohttp import WSMsgType, web

from hadal.errors import HadalError, SandboxFileError
from hadal.node.command import Command
from hadal.node.routes.commands import obey
from hadal.node.routes.http import box_of, parameters
from hadal.node.wire import Tag, decode_fields

__all__ = ["routes"]

routes = web.RouteTableDef()


@routes.get(r"/v1/boxes/{box}/ports/{port:[0-9]{1,5}}")
async def port(request: web.Request) -> web.WebSocketResponse:
    """GET /v1/boxes/{box}/ports/{port}?host=, upgraded: a connection to a port in the box.

    Binary frames both ways; {"input_end": true} closes the box's side of it for reading.
    """
    box, number = box_of(request), request.match_info["port"]
    host = parameters(request).get("host", "127.0.0.1")
    with box.open_applet("connect", host, number, stdin=True) as running:
        await _connected(running, f"{host}:{number}")
        socket = web.WebSocketResponse(max_msg_size=1 << 20)
        await socket.prepare(request)
        sending = asyncio.get_running_loop().create_task(_send_port(socket, running))
        try:
            async for message in socket:
                try:
                    box.touch()
                except HadalError:
                    break  # it is gone, or it sleeps and cannot be woken now
                if message.type == WSMsgType.BINARY:
                    await running.guest.write(message.data)
                elif message.type == WSMsgType.TEXT:
                    obey(running, message.data)
        finally:
            sending.cancel()
    return socket


async def _send_port(socket: web.WebSocketResponse, running: Command) -> None:
    async for stream, _, data in running.output.follow():
        if stream == 1:
            await socket.send_bytes(data)
    await socket.close()


async def _connected(running: Command, where: str) -> None:
    """Wait until a port has answered: then something is on standard error, and its first number is 0."""
    async for stream, _, data in running.output.follow():
        errno = int.from_bytes(decode_fields(data)[Tag.ERRNO][:4], "little") if stream == 2 else 0
        if errno:
            raise SandboxFileError(errno, where)
        return
    raise SandboxFileError(errno_module.ECONNREFUSED, where)

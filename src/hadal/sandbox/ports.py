"""Ports of a box on this machine's loopback."""

import asyncio
import contextlib

from aiohttp import WSMsgType

from hadal.errors import HadalError
from hadal.sandbox.client import NodeClient

__all__ = ["listen_for"]

_CHUNK = 64 * 1024


async def listen_for(client: NodeClient, path: str, host: str, local_port: int) -> asyncio.Server:
    """Listen, and carry every connection to a port of a box."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(HadalError, ConnectionError):
            await _carry(client, path, host, reader, writer)
        writer.close()

    return await asyncio.start_server(carry, "127.0.0.1", local_port)


async def _carry(
    client: NodeClient,
    path: str,
    host: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    socket = await client.websocket(path, query={"host": host})

    async def outward() -> None:
        while data := await reader.read(_CHUNK):
            await socket.send_bytes(data)
        await socket.send_json({"input_end": True})

    sending = asyncio.get_running_loop().create_task(outward())
    try:
        async for message in socket:
            if message.type == WSMsgType.BINARY:
                writer.write(message.data)
                await writer.drain()
    finally:
        sending.cancel()
        await socket.close()

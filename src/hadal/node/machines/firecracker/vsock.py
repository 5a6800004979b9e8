"""Virtio sockets as Firecracker has them: connections through a Unix socket of the host."""

import asyncio
import socket
from pathlib import Path

from hadal.errors import NodeError
from hadal.node.machines.jail_files import socket_path

__all__ = ["PORT", "connect_vsock"]

PORT = 52
"""On which the guest program listens."""

_ANSWER_BYTES = 32
_AGAIN_S = 0.002


async def connect_vsock(path: Path, port: int, timeout_s: float) -> socket.socket:
    """Return a connection to a port of a guest, as soon as somebody listens there.

    Args:
        path: Of the socket of the device.
        port: In the guest.
        timeout_s: For how long it is tried.

    Raises:
        NodeError: Nobody does in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while (connected := await _try(path, port)) is None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(_AGAIN_S)
            return connected
    except TimeoutError as error:
        raise NodeError(f"no guest listens on port {port} of {path}") from error


async def _try(path: Path, port: int) -> socket.socket | None:
    loop = asyncio.get_running_loop()
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connected.setblocking(False)
    try:
        with socket_path(path) as reached:
            await loop.sock_connect(connected, reached)
        await loop.sock_sendall(connected, f"CONNECT {port}\n".encode())
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < _ANSWER_BYTES:
            part = await loop.sock_recv(connected, 1)  # what follows is the guest's
            if not part:
                break
            answer += part
        if answer.startswith(b"OK ") and answer.endswith(b"\n"):
            return connected
    except (FileNotFoundError, ConnectionError):
        pass
    except BaseException:
        connected.close()
        raise
    connected.close()
    return None

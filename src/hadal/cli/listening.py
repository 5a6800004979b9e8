"""Listening on an address: taken before anything else is said, so that what is said is true."""

import ipaddress
import socket
from typing import Any

from hadal.errors import ConfigError

__all__ = ["is_loopback", "listen", "run_app"]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Take an address; port 0 takes one that is free.

    Returns:
        The socket, and the URL that it can be reached at.

    Raises:
        ConfigError: It is taken, or none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.create_server(address[:2], family=family, backlog=2048)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="name another --port; 0 takes one that is free",
        ) from error
    shown = f"[{host}]" if ":" in host else host
    return taken, f"http://{shown}:{taken.getsockname()[1]}"


def run_app(app: Any, taken: socket.socket, **settings: Any) -> None:
    """Serve an application there until a signal ends it.

    Args:
        app: ASGI application.
        taken: From `listen`.
        **settings: More of uvicorn's.
    """
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", server_header=False, **settings)
    uvicorn.Server(config).run(sockets=[taken])

"""What only this machine reaches answers only to the names of this machine.

A web page of somebody else's can give its own name our address (DNS rebinding), and would read and use everything
through the browser of whoever looks at it. The browser says that name in the Host header.
"""

from typing import Any
from urllib.parse import urlsplit

from hadal.cli.listening import is_loopback

__all__ = ["LocalNames"]

_REFUSED = b"asked by another name than one of this machine (localhost, 127.0.0.1, ::1): see Host\n"


class LocalNames:
    """ASGI application around another one: requests for other hosts are refused with 421.

    Args:
        app: What answers the others.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or a part of the life of the server."""
        if scope["type"] != "http" or _is_local(dict(scope["headers"]).get(b"host", b"")):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(_REFUSED))]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSED})


def _is_local(host: bytes) -> bool:
    try:
        name = urlsplit(f"//{host.decode('ascii')}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)

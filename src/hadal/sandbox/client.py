"""Requests to a node daemon: over a Unix socket or HTTP, with its errors as exceptions of ours."""

import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import time
import weakref
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from hadal import errors
from hadal.errors import (
    ConfigError,
    GoneCause,
    HadalError,
    NodeAuthError,
    NodeError,
    SandboxFileError,
)

__all__ = ["ERROR_DETAILS", "NodeClient", "close_all", "read_error"]

ERROR_DETAILS = ("errno", "filename", "cause", "position", "recorded", "asked")
"""Attributes of our errors that go over the wire."""
_PATIENCE_S, _FIRST_PATIENCE_S = 60.0, 5.0
_LARGE = 1 << 18
_BY_CODE = {
    kind.code: kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, HadalError)
}


def read_error(body: Any) -> HadalError:
    """Make the error that a node has described."""
    code, message, hint = body.get("code"), str(body.get("message")), body.get("hint")
    details: dict[str, Any] = body.get("details") or {}
    kind = _BY_CODE.get(code, NodeError)
    if kind is SandboxFileError:
        return SandboxFileError(details["errno"], details["filename"], hint=hint)
    error = HadalError.__new__(kind, message)
    error.args = (message,)
    if "cause" in details:
        details["cause"] = GoneCause(details["cause"])
    error.__dict__.update(details, message=message, hint=hint)
    return error


_clients: weakref.WeakSet["NodeClient"] = weakref.WeakSet()


async def close_all(loop: asyncio.AbstractEventLoop) -> None:
    """Close what is open on this loop."""
    for client in list(_clients):
        if client.loop is loop:
            await client.close()


def _close_later(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> None:
    if not session.closed and loop.is_running():
        loop.call_soon_threadsafe(lambda: loop.create_task(session.close()))


class NodeClient:
    """A connection pool to one node.

    Requests that change something carry a request id: they are sent again when the connection breaks, and
    done once.

    Args:
        url: `unix:///path` or `http(s)://host:port`.
        key: API key, for HTTP.
        verify: Certificate file to trust, or None for the system's.

    Raises:
        ConfigError: The address is of another form.
    """

    def __init__(self, url: str, *, key: str | None = None, verify: Path | None = None) -> None:
        if not re.match(r"unix:///|https?://[^/]", url):
            raise ConfigError(
                f"address of a node: expected unix:///path or http(s)://host:port, got {url!r}",
                hint=f"write unix://{url}" if url.startswith("/") else None,
            )
        self.url = url
        self._key = key
        self._verify = verify
        self._session: aiohttp.ClientSession | None = None
        self._reached = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._base = "http://node" if url.startswith("unix://") else url.rstrip("/")

    def twin(self) -> "NodeClient":
        """Return another client of the same node."""
        return NodeClient(self.url, key=self._key, verify=self._verify)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self.loop = asyncio.get_running_loop()
            _clients.add(self)
            connector: aiohttp.BaseConnector
            if self.url.startswith("unix://"):
                connector = aiohttp.UnixConnector(self.url.removeprefix("unix://"), limit=0)
            else:
                connector = aiohttp.TCPConnector(limit=0, ssl=self._ssl())
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=headers, timeout=timeout, auto_decompress=False
            )
            # Whoever drops a box that lives on has nothing to close.
            weakref.finalize(self, _close_later, self._session, self.loop).atexit = False
        return self._session

    def _ssl(self) -> Any:
        if self._verify is None:
            return True
        import ssl

        return ssl.create_default_context(cafile=str(self._verify))

    def _url(self, path: str, query: Mapping[str, str | bytes] | None) -> URL:
        text = "&".join(
            f"{name}={quote(os.fsencode(value), safe='')}" for name, value in (query or {}).items()
        )
        return URL(f"{self._base}{path}{'?' if text else ''}{text}", encoded=True)

    async def request(
        self, method: str, path: str, *, query: Mapping[str, str | bytes] | None = None,
        body: Any = None, data: Any = None,
    ) -> Any:  # fmt: skip
        """Send a request and return the JSON of its answer.

        Raises:
            NodeError: The node cannot be reached, also after some tries.
            HadalError: What the node answered.
        """
        payload = data if body is None else json.dumps(body).encode()
        replayable = payload is None or isinstance(payload, bytes)
        began, attempt = time.monotonic(), 0
        while True:
            try:
                # Large bytes as a stream: they are sent in parts, between which others get their turn.
                sent = payload
                if isinstance(payload, bytes) and len(payload) > _LARGE:
                    sent = io.BytesIO(payload)
                async with self._open().request(
                    method, self._url(path, query), data=sent
                ) as response:
                    self._reached = True
                    return await self._answer(response)
            except HadalError:
                raise  # one of them is an OSError
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
                last = error
            # A node that has answered before is being restarted; one that never has is not there.
            patience = _PATIENCE_S if self._reached else _FIRST_PATIENCE_S
            if not replayable or time.monotonic() - began > patience:
                break
            await asyncio.sleep(min(0.1, 0.02 * 2**attempt))
            attempt += 1
        raise NodeError(
            f"the node at {self.url} cannot be reached: {last}",
            hint="`hadal node status` says whether it runs",
        ) from last

    async def _answer(self, response: aiohttp.ClientResponse) -> Any:
        text = await response.read()
        try:
            body = json.loads(text)
        except ValueError as error:
            raise NodeError(
                f"the node at {self.url} answered {response.status} with something that is no JSON"
            ) from error
        if response.status >= 400:
            raise read_error(body)
        return body

    @contextlib.asynccontextmanager
    async def download(
        self, path: str, *, query: Mapping[str, str | bytes]
    ) -> AsyncGenerator[aiohttp.StreamReader]:
        """Open the body of an answer; a body that is cut off raises instead of ending."""
        try:
            async with self._open().get(self._url(path, query)) as response:
                if response.status >= 400:
                    await self._answer(response)
                yield response.content
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise NodeError(f"the stream from {self.url} broke off: {error}") from error

    async def websocket(
        self, path: str, *, query: Mapping[str, str | bytes] | None = None
    ) -> aiohttp.ClientWebSocketResponse:
        """Open a stream in both directions."""
        try:
            return await self._open().ws_connect(
                self._url(path, query), heartbeat=20, max_msg_size=1 << 20
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 401:
                raise NodeAuthError("the node does not know this API key") from error
            # The reason is in the body, which a handshake does not keep: ask for it.
            await self.request("GET", path, query=query)
            raise NodeError(f"the node refused a stream: {error.status}") from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise NodeError(f"the node at {self.url} cannot be reached: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

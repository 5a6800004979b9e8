"""A command that runs: its streams, and what can be done to it."""

import asyncio
import base64
import dataclasses
import json
import signal as signals
from collections.abc import AsyncIterator
from typing import Any, Literal

from aiohttp import ClientError, ClientWebSocketResponse, WSMsgType

from hadal.errors import NodeError
from hadal.sandbox.client import NodeClient, read_error
from hadal.sandbox.results import ExecResult

__all__ = ["AsyncProcess", "decode_result"]

StreamName = Literal["stdout", "stderr"]


def decode_result(body: dict[str, Any]) -> ExecResult:
    """Read a result as the node sends it."""
    fields = dict(body)
    for name in ("stdout_bytes", "stderr_bytes"):
        fields[name] = base64.b64decode(fields[name])
    return ExecResult(**fields)


class AsyncProcess:
    """A handle on a command. Iterate over it for its output; it goes on whether anybody reads or not.

    Attributes:
        id: Its number in the log of the box: `box.attach(id)` gives another handle, from any process.
    """

    def __init__(
        self, client: NodeClient, box: str, command: int, stdout: int = 0, stderr: int = 0
    ) -> None:
        self.id = command
        self._client = client
        self._path = f"/v1/boxes/{box}/commands/{command}"
        self._offsets = {"stdout": stdout, "stderr": stderr}
        self._socket: ClientWebSocketResponse | None = None
        self._connecting = asyncio.Lock()  # a reader and a writer share one connection
        self._result: ExecResult | None = None
        self._output: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    async def _connect(self) -> ClientWebSocketResponse:
        async with self._connecting:
            if self._socket is None or self._socket.closed:
                query = {name: str(offset) for name, offset in self._offsets.items()}
                self._socket = await self._client.websocket(f"{self._path}/attach", query=query)
            return self._socket

    def __aiter__(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        return self._read()

    async def _read(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        lost = 0
        while self._result is None:
            socket = await self._connect()
            message = await socket.receive()
            if message.type == WSMsgType.BINARY:
                lost = 0
                name: StreamName = "stdout" if message.data[0] == 1 else "stderr"
                data = bytes(message.data[9:])
                self._offsets[name] = int.from_bytes(message.data[1:9], "little") + len(data)
                yield name, data
            elif message.type == WSMsgType.TEXT:
                self._end(json.loads(message.data))
            else:  # the connection broke off: go on where it was
                lost += 1
                self._socket = None
                if lost > 5:
                    raise NodeError(f"the output of command {self.id} breaks off again and again")

    def _end(self, body: dict[str, Any]) -> None:
        if "error" in body:
            raise read_error(body["error"])
        self._result = decode_result(body["result"])

    async def wait(self) -> ExecResult:
        """Wait for its end and return its result, with the output that nobody has read by then.

        Raises:
            SandboxGoneError: The box has ended.
        """
        async for name, data in self:
            self._output[name].append(data)
        assert self._result is not None
        await self.detach()
        return dataclasses.replace(
            self._result,
            stdout_bytes=b"".join(self._output["stdout"]),
            stderr_bytes=b"".join(self._output["stderr"]),
        )

    async def write(self, data: bytes | str) -> None:
        """Give it input; for a command started with `interactive` or a terminal.

        What it has not read before its end is lost.

        Raises:
            NodeError: The connection broke off; how much of the input has arrived is not known.
        """
        payload = data.encode() if isinstance(data, str) else data
        for at in range(0, len(payload), 1 << 18):
            await self._send(payload[at : at + (1 << 18)])

    async def _send(self, message: bytes | dict[str, Any]) -> None:
        if self._result is not None:
            return
        socket = await self._connect()
        try:
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_json(message)
        except (ClientError, ConnectionError) as error:
            # The node closes it after the end of the command, which may be on its way to us.
            await asyncio.sleep(0.1)
            if self._result is None:
                raise NodeError(f"the input of command {self.id} broke off: {error}") from error

    async def close_stdin(self) -> None:
        """Say that no more input comes."""
        await self._send({"input_end": True})

    async def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal."""
        await self._send({"resize": [rows, columns]})

    async def kill(self, signal: int = signals.SIGKILL) -> None:
        """Signal its process group; SIGKILL reaches every process of its session."""
        await self._client.request("POST", f"{self._path}/signal", body={"signal": int(signal)})

    async def detach(self) -> None:
        """Let go of it; it goes on."""
        if self._socket is not None:
            await self._socket.close()
            self._socket = None

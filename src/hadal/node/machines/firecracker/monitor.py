"""Firecracker's API socket: what the node tells a microVM from outside of it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from hadal.errors import NodeError, UnsupportedError
from hadal.node.guest import Guest
from hadal.node.machines.firecracker.api import VERSION, ApiError, find_request
from hadal.node.machines.firecracker.vsock import PORT, connect_vsock
from hadal.node.machines.jail_files import socket_path
from hadal.node.machines.qemu import FOLDER

__all__ = ["FirecrackerMonitor"]

_ANSWER_S = 30.0
_SNAPSHOT_S = 300.0
_ANSWER_BYTES = 64 * 1024
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError)


class FirecrackerMonitor:
    """The monitor of one microVM.

    Args:
        socket: Where its API is, on the host, in the folder of the machine.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    @classmethod
    async def connect(cls, socket: Path) -> "FirecrackerMonitor":
        """Connect to the one that listens at a path.

        Raises:
            NodeError: Nobody does, or it is not Firecracker.
        """
        monitor = cls(socket)
        about = await monitor.tell("GET", "/")
        if about.get("app_name") != "Firecracker":
            raise NodeError(f"what listens at {socket} is not Firecracker")
        return monitor

    async def check_version(self) -> None:
        """See that it boots kernels as Debian packs them.

        Raises:
            UnsupportedError: It is too old.
        """
        said = str((await self.tell("GET", "/version")).get("firecracker_version"))
        found = tuple(int(part) for part in said.split(".")[:2] if part.isdecimal())
        if found < VERSION:
            wanted = ".".join(map(str, VERSION))
            raise UnsupportedError(
                f"Firecracker {said[:40]} boots no kernel as Debian packs it; {wanted} does",
                hint=f"install Firecracker {wanted} or newer, or give the node a kernel that is unpacked (vmlinux)",
            )

    async def tell(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = _ANSWER_S
    ) -> dict[str, Any]:  # fmt: skip
        """Make a request, and return what it answers: nothing, for most.

        Raises:
            NodeError: Firecracker refuses it, or does not answer.
        """
        try:
            find_request(method, path, body)
        except ApiError as error:
            raise NodeError(f"no request of Firecracker's API: {error}") from error
        try:
            async with asyncio.timeout(timeout_s):
                status, said = await self._ask(method, path, body)
        except _FAILURES as error:
            raise NodeError(
                f"Firecracker does not answer {method} {path}: {str(error) or type(error).__name__}"
            ) from error
        if status not in (200, 204):
            fault = str(said.get("fault_message", f"status {status}"))
            raise NodeError(f"Firecracker refuses {method} {path}: {fault[:500]}")
        return said

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        with socket_path(self._socket) as reached:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=reached)) as session,
                session.request(
                    method, f"http://localhost{path}", json=body,
                    headers={"Accept": "application/json"}, skip_auto_headers=("Accept-Encoding", "User-Agent"),
                ) as answer,
            ):  # fmt: skip
                data = b""
                while len(data) < _ANSWER_BYTES and (part := await answer.content.readany()):
                    data += part
        said = json.loads(data) if data else {}
        return answer.status, said if isinstance(said, dict) else {}

    async def stop(self) -> None:
        """Let its processors stand still.

        Raises:
            NodeError: It does not.
        """
        await self.tell("PATCH", "/vm", {"state": "Paused"})

    async def go_on(self) -> None:
        """Let its processors run.

        Raises:
            NodeError: It does not.
        """
        await self.tell("PATCH", "/vm", {"state": "Resumed"})

    async def save_state(self) -> None:
        """Write its memory and the state of its devices into its folder; it has to stand still.

        Connections to its guest end.

        Raises:
            NodeError: It does not.
        """
        for name in ("devices", "memory"):
            (self._socket.parent / name).unlink(missing_ok=True)
        where = {
            "snapshot_path": f"{FOLDER}/devices",
            "mem_file_path": f"{FOLDER}/memory",
        }
        await self.tell("PUT", "/snapshot/create", where, timeout_s=_SNAPSHOT_S)

    @contextlib.asynccontextmanager
    async def parted(self, guest: Guest) -> AsyncGenerator[None]:
        """As other hypervisors' monitors: a snapshot ends all connections to its guest, which then begins anew."""
        await guest.part()
        try:
            yield
        finally:
            vsock = self._socket.parent / "vsock"
            await guest.renew(lambda: connect_vsock(vsock, PORT, _ANSWER_S))

    async def close(self) -> None:
        """Nothing is held."""

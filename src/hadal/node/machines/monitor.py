"""QEMU's monitor: what the node tells a machine from outside of it."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from hadal.errors import NodeError

__all__ = ["Monitor"]

_ANSWER_S = 30.0
_FAILURES = (QMPError, OSError, EOFError)
_POLL_S = 0.001


class Monitor:
    """The monitor of one machine.

    Args:
        client: Connected.
    """

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path) -> "Monitor":
        """Connect to the monitor that listens at a path.

        Raises:
            NodeError: Nobody does.
        """
        client = QMPClient("hadal")
        try:
            async with asyncio.timeout(_ANSWER_S):
                await client.connect(str(path))
        except _FAILURES as error:
            raise NodeError(f"no monitor of a machine at {path}: {error}") from error
        return cls(client)

    async def _tell(self, command: str, **arguments: object) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._client.execute(command, arguments or None)
        except _FAILURES as error:
            raise NodeError(
                f"QEMU does not do {command}: {str(error) or type(error).__name__}"
            ) from error

    async def stop(self) -> None:
        """Let its processors stand still, and all that it was writing be written.

        Raises:
            NodeError: It does not.
        """
        await self._tell("stop")

    async def go_on(self) -> None:
        """Let its processors run.

        Raises:
            NodeError: It does not.
        """
        await self._tell("cont")

    async def save_devices(self, path: str) -> None:
        """Write the state of all but memory and disks into a file; it has to stand still.

        Args:
            path: As QEMU sees it.

        Raises:
            NodeError: It does not.
        """
        await self._tell("xen-save-devices-state", filename=path, live=False)

    async def load_devices(self, path: Path) -> None:
        """Read such a state, in a QEMU that waits for one; then it stands still.

        Raises:
            NodeError: It is not one of this machine.
        """
        state = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._client.send_fd_scm(state)
            await self._tell("getfd", fdname="state")
        finally:
            os.close(state)
        await self._tell("migrate-incoming", uri="fd:state")
        try:
            async with asyncio.timeout(_ANSWER_S):
                while await self._is_loading():  # noqa: ASYNC110 - it says when by being asked
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise NodeError(f"QEMU does not load its devices in {_ANSWER_S:.0f} s") from error

    async def _is_loading(self) -> bool:
        return (await self._tell("query-status"))["status"] == "inmigrate"

    async def close(self) -> None:
        """Hang up; the machine stays as it is."""
        with contextlib.suppress(*_FAILURES):  # it has ended before us
            await self._client.disconnect()

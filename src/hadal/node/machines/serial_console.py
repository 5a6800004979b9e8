"""The serial console of a machine whose system has no guest program of ours."""

import asyncio
import time
from pathlib import Path

from hadal.node.guest import Guest, GuestLostError
from hadal.node.machines.jail_files import socket_path
from hadal.node.wire import Fields, Frame

__all__ = ["SerialConsole"]

_KEPT_BYTES = 64 * 1024


class SerialConsole(Guest):
    """What stands in the place of a guest: it knows of no commands, and is lost with the machine.

    Attributes:
        said: The end of what the machine has said since somebody listens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said = bytearray()

    @classmethod
    async def reach(cls, path: Path) -> "SerialConsole":
        """Connect to the console that is a socket at a path.

        Raises:
            GuestLostError: Nobody listens there.
        """
        console = cls()
        try:
            with socket_path(path) as reached:
                loop = asyncio.get_running_loop()
                await loop.create_unix_connection(lambda: console, path=reached)
        except OSError as error:
            raise GuestLostError(f"no console of a machine at {path}: {error}") from error
        return console

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self.said += data
        del self.said[:-_KEPT_BYTES]

    async def type(self, data: bytes) -> None:
        """Give the machine what somebody types on its console.

        Raises:
            GuestLostError: It has ended.
        """
        if self.lost.done() or self._transport is None:
            raise GuestLostError("the machine has ended")
        self._transport.write(data)
        await self.drain()

    def send(self, kind: Frame, command: int, payload: bytes = b"") -> None:
        """Say nothing: what a guest is told is not for a console."""

    async def list(self) -> dict[int, bool]:
        """Return no commands."""
        return {}

    async def settle(self, fields: Fields) -> int:
        """Return the time: nobody there is told who he is.

        Raises:
            GuestLostError: The machine has ended.
        """
        if self.lost.done():
            raise GuestLostError("the machine has ended")
        return time.time_ns()

"""QEMU's monitor: what the node tells a machine from outside of it."""

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncGenerator, Generator, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from hadal.errors import ConfigError, NodeError
from hadal.node.guest import Guest
from hadal.node.machines.jail_files import socket_path
from hadal.node.machines.qemu import FOLDER

__all__ = ["Monitor"]

_ANSWER_S = 30.0
_FAILURES = (QMPError, OSError, EOFError)
_POLL_S = 0.001
_KEY_S = 0.03
"""From one key to the next: a keyboard keeps few that a machine has not read."""
_PICTURE_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_AXIS_MAX = 0x7FFF


class Monitor:
    """The monitor of one machine.

    Args:
        client: Connected.
    """

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._handing = asyncio.Lock()

    @classmethod
    async def connect(cls, path: Path) -> "Monitor":
        """Connect to the monitor that listens at a path.

        Raises:
            NodeError: Nobody does.
        """
        client = QMPClient("hadal")
        try:
            with socket_path(path) as reached:
                async with asyncio.timeout(_ANSWER_S):
                    await client.connect(reached)
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

    async def save_state(self) -> None:
        """Write the state of all but memory and disks, as `devices` in its folder; it has to stand still.

        Raises:
            NodeError: It does not.
        """
        await self._tell("xen-save-devices-state", filename=f"{FOLDER}/devices", live=False)

    @contextlib.asynccontextmanager
    async def parted(self, guest: Guest) -> AsyncGenerator[None]:
        """As other hypervisors' monitors: saving its state leaves the connection to its guest as it is."""
        yield

    async def load_devices(self, path: Path) -> None:
        """Read such a state, in a QEMU that waits for one; then it stands still.

        Raises:
            NodeError: It is not one of this machine.
        """
        state = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self._hand(state, "getfd", fdname="state")
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

    async def _hand(self, descriptor: int, command: str, **arguments: object) -> Any:
        """Tell a command that takes the descriptor which came last."""
        async with self._handing:
            self._client.send_fd_scm(descriptor)
            return await self._tell(command, **arguments)

    async def screenshot(self) -> bytes:
        """Return what is on its screen, as PNG.

        Raises:
            NodeError: QEMU cannot say, or says something else.
        """
        with _picture_file() as file:
            # QEMU takes one that is for writing only.
            write_only = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                number = (await self._hand(write_only, "add-fd"))["fdset-id"]
            finally:
                os.close(write_only)
            try:
                await self._tell("screendump", filename=f"/dev/fdset/{number}", format="png")
            finally:
                await self._tell("remove-fd", **{"fdset-id": number})
            size = os.fstat(file).st_size
            picture = os.pread(file, min(size, _PICTURE_BYTES), 0)
        if size > _PICTURE_BYTES or not picture.startswith(_PNG):
            raise NodeError(f"QEMU says {size} bytes that are no picture in PNG")
        return picture

    async def press(self, keys: Sequence[str]) -> None:
        """Press keys, one after the other, and let go of them.

        Args:
            keys: As QEMU calls them.

        Raises:
            NodeError: It cannot.
        """
        names = [{"type": "qcode", "data": key} for key in keys]
        await self._tell("send-key", keys=names, **{"hold-time": round(_KEY_S * 500)})
        await asyncio.sleep(_KEY_S)

    async def point(self, x: int, y: int, button: str | None, count: int) -> None:
        """Move the pointer, and click.

        Args:
            x: Of the pixel, from the left.
            y: Of the pixel, from the top.
            button: "left", "middle" or "right"; None for none.
            count: How often.

        Raises:
            ConfigError: The screen is smaller.
            NodeError: QEMU cannot.
        """
        width, height = struct.unpack(">II", (await self.screenshot())[16:24])
        if not (0 <= x < width and 0 <= y < height):
            raise ConfigError(f"the screen has {width}x{height} pixels: there is none at {x}, {y}")
        at = {"x": x * _AXIS_MAX // max(width - 1, 1), "y": y * _AXIS_MAX // max(height - 1, 1)}
        events = [{"type": "abs", "data": {"axis": a, "value": v}} for a, v in at.items()]
        await self._tell("input-send-event", events=events)
        for down in (True, False) * (count if button is not None else 0):
            click = {"type": "btn", "data": {"down": down, "button": button}}
            await self._tell("input-send-event", events=[click])
            await asyncio.sleep(_KEY_S)

    async def close(self) -> None:
        """Hang up; the machine stays as it is."""
        with contextlib.suppress(*_FAILURES):  # it has ended before us
            await self._client.disconnect()


@contextlib.contextmanager
def _picture_file() -> Generator[int]:
    file = os.memfd_create("hadal-screen", os.MFD_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)

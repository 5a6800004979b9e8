"""Screen, keyboard, mouse and serial console of a whole machine, from outside: for guests that have no other way in."""

import uuid
from typing import TYPE_CHECKING, Any

from hadal.sandbox.protocol import MouseButton

if TYPE_CHECKING:
    from hadal.sandbox.box import AsyncSandbox

__all__ = ["AsyncConsole", "AsyncKeyboard", "AsyncMouse"]


class _Input:
    def __init__(self, box: "AsyncSandbox") -> None:
        self._box = box

    async def _give(self, what: dict[str, Any], request_id: str | None) -> None:
        if self._box.recorded("input", what):
            return
        body = what | {"request_id": request_id or uuid.uuid4().hex}
        await self._box.client.request("POST", f"/v1/boxes/{self._box.id}/input", body=body)


class AsyncConsole(_Input):
    """The serial console of a machine without a guest program. Both methods raise UnsupportedError elsewhere."""

    async def read(self) -> bytes:
        """Return the end of what was said on it, 64 KiB at most; a node that was started anew has heard no more."""
        path = f"/v1/boxes/{self._box.id}/console"
        async with self._box.client.download(path, query={}) as content:
            return await content.read()

    async def type(self, text: str, *, request_id: str | None = None) -> None:
        """Type a text of at most 4,096 characters on it.

        Args:
            text: As a terminal sends it: Enter is a newline.
            request_id: Twice the same types once. Default: a random one.
        """
        await self._give({"console": text}, request_id)


class AsyncKeyboard(_Input):
    """The keyboard, of US layout. Every method raises UnsupportedError where the box has none."""

    async def type(self, text: str, *, request_id: str | None = None) -> None:
        """Type a text of at most 4,096 characters, some thirty a second.

        Args:
            text: Printable ASCII, newlines and tabs.
            request_id: Twice the same types once. Default: a random one.

        Raises:
            ConfigError: There is no key for one of its characters; then none is typed.
        """
        await self._give({"text": text}, request_id)

    async def press(self, keys: str, *, request_id: str | None = None) -> None:
        """Press keys together and let go of them.

        Args:
            keys: As "Enter", "a" or "Control+Alt+F2": the names that browsers have for them.
            request_id: Twice the same presses once. Default: a random one.

        Raises:
            ConfigError: There is no such key.
        """
        await self._give({"press": keys}, request_id)


class AsyncMouse(_Input):
    """The mouse. Every method raises UnsupportedError where the box has none."""

    async def move(self, x: int, y: int, *, request_id: str | None = None) -> None:
        """Move to a pixel of the screen, as `screenshot` shows it.

        Raises:
            ConfigError: The screen is smaller.
        """
        await self._give({"pointer": {"x": x, "y": y}}, request_id)

    async def click(
        self, x: int, y: int, *, button: MouseButton = "left", count: int = 1, request_id: str | None = None
    ) -> None:  # fmt: skip
        """Move to a pixel of the screen and click.

        Args:
            x: Of the pixel, from the left.
            y: Of the pixel, from the top.
            button: Which.
            count: How often: 2 for a double click.
            request_id: Twice the same clicks once. Default: a random one.

        Raises:
            ConfigError: The screen is smaller.
        """
        pointer = {"x": x, "y": y, "button": button, "count": count}
        await self._give({"pointer": pointer}, request_id)

"""Screen, keyboard and mouse."""

import struct

from hadal.errors import ConfigError
from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, expect, holds

__all__ = ["screenshot", "typing_and_clicking"]

_PNG = b"\x89PNG\r\n\x1a\n"


@check(Capability.SCREEN)
def screenshot(make: MakeBox) -> None:
    """A picture of the screen is a PNG of some size."""
    with make() as box:
        picture = box.screenshot()
        equal(picture[:8], _PNG)
        width, height = struct.unpack(">II", picture[16:24])
        holds(width >= 320 and height >= 200, f"{width}x{height} pixels")


@check(Capability.SCREEN)
def typing_and_clicking(make: MakeBox) -> None:
    """What is typed and clicked is in the log, once for each request; what cannot be is refused whole."""
    with make() as box:
        box.keyboard.type("ls\n", request_id="once")
        box.keyboard.type("ls\n", request_id="once")
        box.keyboard.press("Control+Alt+F2")
        box.mouse.click(3, 4, button="right", count=2)
        with expect(ConfigError) as caught:
            box.keyboard.type("ab\N{SNOWMAN}")
        holds("\N{SNOWMAN}" in str(caught.error), f"it does not say which: {caught.error}")
        with expect(ConfigError):
            box.keyboard.press("Control+Any")
        with expect(ConfigError):
            box.mouse.move(65535, 0)
        inputs = [event.request for event in box.log() if event.kind == "input"]
        pointer = {"x": 3, "y": 4, "button": "right", "count": 2}
        wanted = [{"text": "ls\n"}, {"press": "Control+Alt+F2"}, {"pointer": pointer}]
        equal(inputs[:3], wanted)
        equal(len(inputs), 4, "steps")

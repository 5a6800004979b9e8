"""`hadal box screenshot`, `type`, `press`, `click` and `console`: a whole machine, used from outside."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import Parameter

from hadal.cli.node_options import NodeOptions

if TYPE_CHECKING:
    from hadal.sandbox.box import AsyncSandbox

__all__ = ["click", "console", "press", "screenshot", "type_text"]

_T = TypeVar("_T")


def _in_box(
    where: NodeOptions | None, box: str, work: "Callable[[AsyncSandbox], Awaitable[_T]]"
) -> _T:
    async def run() -> _T:
        async with (where or NodeOptions()).open() as node:
            return await work(await node.open(box))

    return asyncio.run(run())


def screenshot(box: str, file: Path | None = None, /, *, where: NodeOptions | None = None) -> None:
    """Write what is on the screen of a whole machine, as PNG.

    Examples:
        hadal box screenshot desktop screen.png

    Args:
        box: Which.
        file: For the picture. Default: standard output.
        where: The node.
    """
    picture = _in_box(where, box, lambda found: found.screenshot())
    if file is None:
        sys.stdout.buffer.write(picture)
    else:
        file.write_bytes(picture)


def console(box: str, /, *, where: NodeOptions | None = None) -> None:
    """Write the end of what a machine without a guest program has said on its serial console, as it came.

    Examples:
        hadal box console appliance

    Args:
        box: Which.
        where: The node.
    """
    sys.stdout.buffer.write(_in_box(where, box, lambda found: found.console.read()))


def type_text(
    box: str,
    text: str,
    /,
    *,
    enter: bool = False,
    serial: Annotated[bool, Parameter(negative="")] = False,
    where: NodeOptions | None = None,
) -> None:
    """Type a text on the keyboard of a whole machine (US layout), or on its serial console.

    Examples:
        hadal box type desktop root --enter

        hadal box type appliance reboot --enter --serial

    Args:
        box: Which.
        text: Printable ASCII, on a keyboard.
        enter: Press Enter behind it.
        serial: On the console of a machine without a guest program.
        where: The node.
    """
    typed = text + "\n" * enter
    _in_box(where, box, lambda found: (found.console if serial else found.keyboard).type(typed))


def press(box: str, keys: str, /, *, where: NodeOptions | None = None) -> None:
    """Press keys together on the keyboard of a whole machine.

    Examples:
        hadal box press desktop Control+Alt+F2

    Args:
        box: Which.
        keys: Names as browsers have them, joined by +.
        where: The node.
    """
    _in_box(where, box, lambda found: found.keyboard.press(keys))


def click(
    box: str, x: int, y: int, /, *, button: Literal["left", "middle", "right"] = "left", count: int = 1,
    where: NodeOptions | None = None,
) -> None:  # fmt: skip
    """Click on a pixel of the screen of a whole machine.

    Examples:
        hadal box click desktop 320 200 --count 2

    Args:
        box: Which.
        x: Of the pixel, from the left.
        y: Of the pixel, from the top.
        button: Of the mouse.
        count: How often.
        where: The node.
    """
    _in_box(where, box, lambda found: found.mouse.click(x, y, button=button, count=count))

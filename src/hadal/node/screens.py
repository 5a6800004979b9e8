"""Screens, keyboards and mice of machines: what is on one, and what is typed and clicked, written down as steps."""

from hadal.errors import UnsupportedError
from hadal.node.box import Box
from hadal.node.journal import Journal
from hadal.node.machines.keys import chord, strokes
from hadal.node.machines.monitor import Monitor
from hadal.node.machines.serial_console import SerialConsole
from hadal.node.steps import begin_step, recorded_step
from hadal.sandbox.protocol import InputRequest
from hadal.sandbox.specs import Capability

__all__ = ["give_input", "read_console", "take_screenshot"]


async def _monitor(box: Box) -> Monitor:
    box.require(Capability.SCREEN)
    assert box.machine is not None
    await box.awake()
    monitor = box.machine.monitor
    assert isinstance(monitor, Monitor)  # what has a screen is QEMU's
    return monitor


async def take_screenshot(box: Box) -> bytes:
    """Return what is on the screen of a box, as PNG.

    Raises:
        UnsupportedError: It has none.
        NodeError: QEMU does not say.
    """
    return await (await _monitor(box)).screenshot()


def _console(box: Box) -> SerialConsole:
    box.require(Capability.SCREEN)
    box.touch()
    if not isinstance(box.guest, SerialConsole):
        hint = "run commands in it: its guest program answers"
        raise UnsupportedError(f"the console of box {box.id} is the node's", hint=hint)
    return box.guest


def read_console(box: Box) -> bytes:
    """Return the end of what a box without a guest program has said on its serial console, 64 KiB at most.

    Raises:
        UnsupportedError: It has a guest program, or no console.
    """
    return bytes(_console(box).said)


async def give_input(journal: Journal, box: Box, request: InputRequest) -> None:
    """Type, on the keyboard or the console, press, or point and click; the same request again does nothing.

    Args:
        journal: Of the node.
        box: Whose keyboard and mouse.
        request: What.

    Raises:
        UnsupportedError: It has none, or it has a guest program and its console is the node's.
        ConfigError: There is no such key, or the screen is smaller.
        NodeError: QEMU does not do it.
        UnknownOutcomeError: A daemon died while it was done: nobody knows how far it came.
    """
    monitor = await _monitor(box)
    console = None if request.console is None else _console(box)
    if recorded_step(journal, box, request.request_id, repeatable=False) is not None:
        return
    what = request.model_dump(mode="json", exclude={"request_id"}, exclude_unset=True)
    if request.text is not None:
        pressed = list(strokes(request.text))
    else:
        pressed = [] if request.press is None else [chord(request.press)]
    with begin_step(journal, box, "input", what, request_id=request.request_id):
        if console is not None:
            await console.type((request.console or "").encode())
        for keys in pressed:
            await monitor.press(keys)
        if request.pointer is not None:
            at = request.pointer
            await monitor.point(at.x, at.y, at.button, at.count)

"""Calls of functions: an interpreter that waits in a box, and one call after the other in it."""

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

from hadal.errors import LaunchError, SandboxError
from hadal.node.box import Box
from hadal.node.guest import GuestLostError
from hadal.node.guest_command import CommandOrder
from hadal.sandbox.specs import FunctionSpec

__all__ = ["CallServer"]

_PROGRAM = Path(__file__).with_name("call_server.py")
_START_S = 120
_ANSWER_BYTES = 96 << 20
_GRACE_S = 5
"""For an answer after a call's time is over; then its interpreter is not trusted any more."""


class _Answers:
    """Takes the output of the interpreter apart."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.errors = bytearray()
        self.command: Any = None
        self._offset = 0

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take bytes of the interpreter."""
        if stream == 2:
            self.errors += data[: 65536 - len(self.errors)]
            return
        self._buffer += data
        self._offset = offset + len(data)
        self.command.acknowledge(self._offset, 0)
        while len(self._buffer) >= 4:
            length = struct.unpack_from("<I", self._buffer)[0]
            if length > _ANSWER_BYTES:
                self.command.signal(9)
                return
            if len(self._buffer) < 4 + length:
                return
            self.messages.put_nowait(_read_answer(bytes(self._buffer[4 : 4 + length])))
            del self._buffer[: 4 + length]


def _read_answer(data: bytes) -> dict[str, Any]:
    """Read what a box says: whatever it is, it is an answer."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        answer = {"error": "CallEnded", "message": f"an answer that cannot be read: {error}"}
    return answer if isinstance(answer, dict) else {"error": "CallEnded", "message": "no answer"}


class CallServer:
    """The interpreter of one box. Calls wait for each other.

    Args:
        box: A box of a `FunctionSpec`.
    """

    def __init__(self, box: Box) -> None:
        self._box = box
        self._answers = _Answers()
        self._lock = asyncio.Lock()
        self._ready: asyncio.Task[None] | None = None
        self._again = False

    def start(self) -> asyncio.Task[None]:
        """Start the interpreter, once; done when it waits for calls."""
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_task(self._start())
            self._ready.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._ready

    async def _start(self) -> None:
        spec = self._box.spec
        assert isinstance(spec, FunctionSpec)
        program = _PROGRAM.read_text(encoding="utf-8")
        time = "again" if self._again else "first"
        order = CommandOrder(
            arguments=[a.encode() for a in (spec.python, "-c", program, time, *spec.preload)],
            environment={**self._box.defaults.env, **spec.env, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=True,
            nofile=spec.nofile,
        )
        self._answers.command = self._box.guest.execute(
            self._box.next_guest_id(), order, self._answers
        )
        try:
            await self._next(_START_S)
        except TimeoutError:
            raise LaunchError(f"{spec.python} does not get ready in {_START_S} s") from None

    async def _next(self, timeout_s: float) -> dict[str, Any]:
        """Return the next message; an end of the interpreter raises."""
        ended = self._answers.command.ended
        message = asyncio.ensure_future(self._answers.messages.get())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait([message, ended], return_when="FIRST_COMPLETED")
        finally:
            if not message.done():
                message.cancel()
        if message.done() and not message.cancelled():
            return message.result()
        try:
            await ended
        except GuestLostError:
            raise self._box.gone() from None
        said = self._answers.errors.decode(errors="replace")[-2000:]
        raise LaunchError(
            f"the interpreter of box {self._box.id} has ended: {said or 'it said nothing'}",
            hint="python and preload in the FunctionSpec must exist in the image",
        )

    async def call(self, call: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a call and return its answer.

        Raises:
            LaunchError: The interpreter does not start, or has ended.
            SandboxGoneError: The box has ended.
        """
        async with self._lock:
            try:
                await asyncio.shield(self.start())
                body = json.dumps({**call, "timeout_s": timeout_s}).encode()
                await self._answers.command.write(struct.pack("<I", len(body)) + body)
                return await self._next(timeout_s + _GRACE_S)
            except TimeoutError:
                self._answers.command.signal(9)
                self._start_again()
                raise SandboxError(
                    f"a call in box {self._box.id} did not end {_GRACE_S} s after its time"
                ) from None
            except LaunchError:
                self._start_again()
                raise

    def _start_again(self) -> None:
        """Let the next call have another interpreter."""
        self._ready = None
        self._again = True
        self._answers = _Answers()

"""One guest, as the node daemon sees it: a connection, with the commands that run behind it."""

import asyncio
import errno
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from hadal.errors import CommandRefusedError, NodeError
from hadal.node.guest_command import CommandOrder, Exit, GuestCommand, OutputSink, Unread
from hadal.node.wire import (
    HEADER,
    PROTOCOL_VERSION,
    WINDOW,
    Fields,
    Frame,
    PortReader,
    Tag,
    TimedOut,
    WireError,
    decode_fields,
    encode_fields,
    encode_frame,
    port_bytes,
)

__all__ = ["Guest", "GuestLostError"]


_EXEC_BYTES = WINDOW
_LISTED_MAX = 1 << 20
_ANSWER_S = 10.0


class GuestLostError(NodeError):
    """The connection to a guest has ended. The box decides what that means."""

    code = "guest_lost"


class Guest(asyncio.Protocol):
    """The connection to one guest.

    Attributes:
        boot_id: Random, of this start of the guest.
        last_id: The largest number of a command when this connection began.
        commands: That run or are not forgotten, by number.
        lost: Done when the connection has ended.
    """

    def __init__(self, *, port: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self._port = PortReader() if port else None
        self._nonce = secrets.randbits(63) if port else 0
        self.boot_id = ""
        self.last_id = 0
        self.commands: dict[int, GuestCommand] = {}
        self.lost: asyncio.Future[None] = loop.create_future()
        self._welcome: asyncio.Future[None] = loop.create_future()
        self._listing: asyncio.Future[dict[int, bool]] | None = None
        self._listed: dict[int, bool] = {}
        self._settling: dict[int, asyncio.Future[dict[int, bytes]]] = {}
        self._settled = 0
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._held: list[bytes] | None = None
        self._parted: asyncio.Future[None] | None = None
        self._known: frozenset[int] = frozenset()

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = 10.0, port: bool = False) -> "Guest":
        """Connect to the guest that listens at a path.

        Args:
            path: Of a socket.
            timeout_s: Until it has answered.
            port: Whether that leads through the port of a virtual machine.

        Raises:
            GuestLostError: Nobody listens, or it is not one of ours.
        """
        guest = cls(port=port)
        await guest._begin(f" at {path}", timeout_s, path=str(path))
        return guest

    @classmethod
    async def over(cls, connected: socket.socket) -> "Guest":
        """Return the guest at the other end of a socket, which is no more the caller's.

        Raises:
            GuestLostError: Nobody answers there, or it is not one of ours.
        """
        guest = cls()
        await guest._begin("", _ANSWER_S, sock=connected)
        return guest

    async def _begin(self, where: str, timeout_s: float, **connection: Any) -> None:
        """Connect as asyncio's `create_unix_connection` is told to, and be welcomed."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_unix_connection(lambda: self, **connection)
                self._hello()
                await asyncio.shield(self._welcome)
        except (OSError, TimeoutError) as error:
            raise GuestLostError(f"no guest answers{where}: {str(error) or 'no answer'}") from error

    @property
    def has_port(self) -> bool:
        """Whether it is reached through the port of a virtual machine."""
        return self._port is not None

    @classmethod
    def parted(cls, boot_id: str, last_id: int, *, port: bool) -> "Guest":
        """Return one that nobody reaches before `renew`, of which an earlier daemon has written down what is given."""
        guest = cls(port=port)
        guest.boot_id, guest.last_id, guest._held = boot_id, last_id, []
        guest._parted = asyncio.get_running_loop().create_future()
        guest._parted.set_result(None)
        return guest

    async def part(self) -> dict[int, bool]:
        """Hold back what is sent from now on until `renew`: the connection is about to end, and the guest is not.

        Returns:
            The commands that the guest knows, and whether each has ended: it has been told all that was sent before.

        Raises:
            NodeError: It does not answer; then all is as it was.
            GuestLostError: It is gone.
        """
        if self.lost.done():
            raise GuestLostError("the guest is gone")
        answer = self._ask_for_list()
        self._held, self._known = [], frozenset(self.commands)
        try:
            async with asyncio.timeout(_ANSWER_S):
                known = await answer
        except BaseException as error:
            self._let_go_of_held()
            if isinstance(error, TimeoutError):
                raise NodeError(f"the machine does not answer in {_ANSWER_S:.0f} s") from None
            raise
        finally:
            self._listing = None
        self._parted = asyncio.get_running_loop().create_future()
        return known

    def _let_go_of_held(self) -> None:
        held, self._held = self._held or [], None
        for frame in held:
            self._write(frame)

    async def renew(self, connect: Callable[[], Awaitable[socket.socket]]) -> None:
        """Go on over another connection, where the last one was.

        Args:
            connect: Makes it, to the same guest.

        Raises:
            NodeError: It does not answer, or is another one. Then this connection is lost.
        """
        if self.lost.done():
            raise GuestLostError("the guest is gone")
        boot_id = self.boot_id
        assert self._parted is not None
        if self._port is not None:
            self._port, self._nonce = PortReader(), secrets.randbits(63)
        self.close()
        await self._parted
        self._buffer.clear()
        self._welcome = asyncio.get_running_loop().create_future()
        try:
            await self._begin("", _ANSWER_S, sock=await connect())
            if self.boot_id != boot_id:
                raise GuestLostError("another guest answers where it was")
        except BaseException as error:  # whatever it is, nobody is to wait for what is held
            self.give_up(str(error) or type(error).__name__)
            raise
        held, self._held = self._held or [], None
        self._writable.set()  # the last connection may have been full when it ended
        for number in sorted(self._known & self.commands.keys()):
            self.send(Frame.ATTACH, number, self.commands[number].place())
        for frame in held:
            self._write(frame)

    def give_up(self, why: str) -> None:
        """Let nobody wait any more for a guest that cannot be reached."""
        if self._parted is not None and not self._parted.done():
            self._parted.set_result(None)
        self._held = None
        self.connection_lost(GuestLostError(why))
        self.close()

    def _hello(self) -> None:
        hello = {Tag.VERSION_MIN: PROTOCOL_VERSION, Tag.VERSION_MAX: PROTOCOL_VERSION}
        assert self._transport is not None
        if self._port is None:
            self._transport.write(encode_frame(Frame.HELLO, 0, encode_fields(hello)))
        else:
            hello |= {Tag.NONCE: self._nonce}
            frame = encode_frame(Frame.HELLO, 0, encode_fields(hello))
            self._transport.write(port_bytes(frame, begins=True))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio: every command that has not ended is lost, unless it goes on over another one."""
        if self._parted is not None and not self._parted.done():
            self._parted.set_result(None)
            return
        error = GuestLostError(f"the guest is gone: {exc}" if exc else "the guest is gone")
        for command in self.commands.values():
            command.lost(error)
        for future in (self._welcome, self._listing, *self._settling.values()):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()
        self._writable.set()
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._writable.set()

    async def drain(self) -> None:
        """Wait until the connection takes more."""
        await self._writable.wait()

    def close(self) -> None:
        """End the connection; the guest and its commands go on."""
        if self._transport is not None:
            self._transport.abort()

    def send(self, kind: Frame, command: int, payload: bytes = b"") -> None:
        """Send a frame. After the end of the connection nothing is sent: `lost` says so."""
        frame = encode_frame(kind, command, payload)
        if self._held is not None:
            self._held.append(frame)
        else:
            self._write(frame)

    def _write(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame if self._port is None else port_bytes(frame))

    def execute(self, number: int, order: CommandOrder, sink: OutputSink) -> GuestCommand:
        """Start a command. Numbers grow; one that has been used is refused by the guest."""
        command = GuestCommand(self, number, sink)
        if self.lost.done():
            command.lost(GuestLostError("the guest is gone"))
            return command
        payload = encode_fields(order.fields())
        if len(payload) > _EXEC_BYTES:
            text = f"not started: {len(payload)} bytes of arguments and environment"
            command.lost(CommandRefusedError(text, errno=errno.E2BIG))
            return command
        command.expect(0, 0, order.output_limit)
        self.commands[number] = command
        self.send(Frame.EXEC, number, payload)
        return command

    def attach(self, number: int, sink: OutputSink, stdout: int, stderr: int) -> GuestCommand:
        """Take over a command that an earlier connection started; its output from these offsets on."""
        command = GuestCommand(self, number, sink)
        command.started.set_result(0)
        command.expect(stdout, stderr, 0)
        self.commands[number] = command
        fields = encode_fields({Tag.OUT_OFFSET: stdout, Tag.ERR_OFFSET: stderr})
        self.send(Frame.ATTACH, number, fields)
        return command

    def leave(self, number: int) -> None:
        """Let a command run that nobody here knows any more: its output and its end are dropped."""
        sink = Unread()
        command = sink.command = self.attach(number, sink, 0, 0)
        command.ended.add_done_callback(
            lambda ended: ended.exception() is None and command.forget()
        )

    def forget(self, number: int) -> None:
        """Drop an ended command here and there."""
        if self.commands.pop(number, None) is not None:
            self.send(Frame.FORGET, number)

    async def list(self) -> dict[int, bool]:
        """Return the commands that the guest knows, and whether each has ended."""
        answer = self._ask_for_list()
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError:
            self.close()
            raise GuestLostError(f"the guest does not list its commands in {_ANSWER_S} s") from None
        finally:
            self._listing = None

    def _ask_for_list(self) -> "asyncio.Future[dict[int, bool]]":
        self._listed = {}
        self._listing = asyncio.get_running_loop().create_future()
        self.send(Frame.LIST, 0)
        return self._listing

    def tell(self, fields: Fields) -> int:
        """Tell a virtual machine who it is, and do not wait for an answer; return its number."""
        self._settled += 1
        self.send(Frame.SETTLE, self._settled, encode_fields(fields))
        return self._settled

    async def settle(self, fields: Fields) -> int:
        """Tell a virtual machine who it is, and return what its clock says after that, in ns.

        Raises:
            NodeError: It does not do it; it may still do it later, where it did not answer in time.
            GuestLostError: The connection has ended.
        """
        answered = asyncio.get_running_loop().create_future()
        self._settling[self._settled + 1] = answered
        number = self.tell(fields)
        if self.lost.done():
            answered.set_exception(GuestLostError("the guest is gone"))
        try:
            async with asyncio.timeout(_ANSWER_S):
                answer = await answered
        except TimeoutError:
            raise NodeError(f"the machine does not answer in {_ANSWER_S:.0f} s") from None
        finally:
            del self._settling[number]
        if Tag.ERRNO in answer:
            what = answer.get(Tag.TEXT, b"")[:200].decode(errors="replace")
            reason = os.strerror(_small(answer, Tag.ERRNO))
            raise NodeError(f"the machine does not do what it is told: {what}: {reason}")
        return int.from_bytes(answer.get(Tag.TIME, b"")[:8], "little")

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._port is None:
            self._take(data)
            return
        for number, part in enumerate(self._port.read(data)):
            if number:  # a connection begins, perhaps ours
                self._buffer.clear()
            self._take(part)

    def _take(self, data: bytes) -> None:
        """Take the frames that are whole."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= HEADER.size:
                length, kind, _, number = HEADER.unpack_from(buffer, at)
                if length > WINDOW + 64:
                    raise WireError(f"a frame of {length} bytes")
                end = at + HEADER.size + length
                if end > len(buffer):
                    break
                self._frame(kind, number, bytes(buffer[at + HEADER.size : end]))
                at = end
        except (WireError, ValueError) as error:
            # The box has got at its guest, or this is a bug: either way nothing more is believed.
            self.connection_lost(GuestLostError(f"it broke the protocol: {error}"))
            self.close()
            return
        if at:
            del buffer[:at]

    def _frame(self, kind: int, number: int, payload: bytes) -> None:
        if self._port is not None and not self._welcome.done() and kind != Frame.WELCOME:
            return  # said to whoever was here before
        command = self.commands.get(number)
        match kind:
            case Frame.STDOUT | Frame.STDERR:
                if command is not None:
                    command.take_output(1 if kind == Frame.STDOUT else 2, payload)
            case Frame.STARTED if command is not None:
                if not command.started.done():
                    command.started.set_result(_number(decode_fields(payload), Tag.PID))
            case Frame.EXIT if command is not None:
                if not command.started.done():
                    command.started.set_result(0)
                if not command.ended.done():
                    command.ended.set_result(_read_exit(decode_fields(payload)))
                command.input_taken(1 << 62)
            case Frame.FAILED if command is not None:
                refusal = _read_refusal(decode_fields(payload))  # or it is lost with the connection
                self.commands.pop(number)
                command.lost(refusal)
            case Frame.INPUT_ACK if command is not None:
                command.input_taken(_number(decode_fields(payload), Tag.OFFSET))
            case Frame.WELCOME:
                fields = decode_fields(payload)
                if _number(fields, Tag.NONCE) != self._nonce:
                    return  # the answer to whoever was here before
                self.boot_id = fields.get(Tag.BOOT_ID, b"").decode("ascii")
                self.last_id = _number(fields, Tag.LAST_ID)
                if not self._welcome.done():
                    self._welcome.set_result(None)
            case Frame.COMMAND if self._listing is not None:
                self._listed[number] = Tag.STATUS in decode_fields(payload)
                if len(self._listed) > _LISTED_MAX:
                    raise WireError("a list of commands without an end")
            case Frame.LISTED if self._listing is not None and not self._listing.done():
                self._listing.set_result(self._listed)
            case Frame.SETTLED if number in self._settling and not self._settling[number].done():
                self._settling[number].set_result(decode_fields(payload))
            case Frame.ERROR:
                text = decode_fields(payload).get(Tag.TEXT, b"")[:200].decode(errors="replace")
                raise WireError(f"it refuses what we sent: {text}")
            case Frame.STARTED | Frame.EXIT | Frame.FAILED | Frame.INPUT_ACK if command is None:
                pass  # it is forgotten here
            case Frame.COMMAND | Frame.LISTED | Frame.PONG | Frame.SETTLED:
                pass  # nobody waits for it any more
            case _:
                raise WireError(f"a frame of type {kind}")


def _number(fields: Mapping[int, bytes], tag: Tag) -> int:
    return int.from_bytes(fields.get(tag, b"")[:8], "little")


def _small(fields: Mapping[int, bytes], tag: Tag) -> int:
    """Return a number that the system's own functions will be given."""
    number = _number(fields, tag)
    if number > 0xFFFF:
        raise WireError(f"{number} for {tag.name}")
    return number


def _read_exit(fields: Mapping[int, bytes]) -> Exit:
    return Exit(
        status=_small(fields, Tag.STATUS),
        stdout_bytes=_number(fields, Tag.OUT_TOTAL),
        stderr_bytes=_number(fields, Tag.ERR_TOTAL),
        timed_out=TimedOut(_number(fields, Tag.TIMED_OUT)),
        started_ns=_number(fields, Tag.START_TIME),
        ended_ns=_number(fields, Tag.TIME),
        user_us=_number(fields, Tag.USER_US),
        system_us=_number(fields, Tag.SYSTEM_US),
        max_rss_kb=_number(fields, Tag.MAX_RSS_KB),
        oom_kills=_number(fields, Tag.OOM_KILLS),
    )


def _read_refusal(fields: Mapping[int, bytes]) -> CommandRefusedError:
    number = _small(fields, Tag.ERRNO)
    what = fields.get(Tag.TEXT, b"")[:256].decode(errors="replace")
    return CommandRefusedError(f"not started: {what}: {os.strerror(number)}", errno=number)

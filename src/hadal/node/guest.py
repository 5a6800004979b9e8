"""One guest, as the node daemon sees it: a connection, and the commands that run behind it."""

import asyncio
import errno
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hadal.errors import CommandRefusedError, NodeError
from hadal.node.wire import (
    HEADER,
    PROTOCOL_VERSION,
    TAIL,
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

__all__ = ["CommandOrder", "Exit", "Guest", "GuestCommand", "GuestLostError", "OutputSink"]


_EXEC_BYTES = WINDOW
_LISTED_MAX = 1 << 20
_ANSWER_S = 10.0


class GuestLostError(NodeError):
    """The connection to a guest has ended. The box decides what that means."""

    code = "guest_lost"


@dataclass(frozen=True, kw_only=True)
class CommandOrder:
    """What a guest is to run.

    Attributes:
        arguments: Program and arguments; for an applet its name and arguments.
        environment: All of it; HOME and PATH are added where they are missing.
        directory: Where it starts.
        user: Name, id, `name:group` or `uid:gid` of the image.
        tty: Rows and columns of a terminal, or None.
        stdin: Whether standard input is a pipe; else it is empty.
        timeout_ms: From its start to its end; 0 for none. Then its session is killed.
        quiet_ms: Without output; 0 for none.
        output_limit: Bytes of each stream that are kept; 0 for all.
        applet: Whether the guest itself does it.
        nofile: Open files it may have.
        kept: Whether it has the descriptor that the box was made with, as number 4.
    """

    arguments: Sequence[bytes]
    environment: Mapping[str, str] | None = None
    directory: bytes = b"/"
    user: str = "0"
    tty: tuple[int, int] | None = None
    stdin: bool = False
    timeout_ms: int = 0
    quiet_ms: int = 0
    output_limit: int = 0
    applet: bool = False
    nofile: int = 1024
    kept: bool = False

    def fields(self) -> Fields:
        """Return what the guest is told."""
        fields: dict[Tag, int | bytes | list[int | bytes]] = {
            Tag.ARGUMENT: list(self.arguments),
            Tag.ENVIRONMENT: [
                os.fsencode(f"{name}={value}") for name, value in (self.environment or {}).items()
            ],
            Tag.DIRECTORY: self.directory,
            Tag.USER: os.fsencode(self.user),
            Tag.INPUT: int(self.stdin),
            Tag.TIMEOUT_MS: self.timeout_ms,
            Tag.QUIET_MS: self.quiet_ms,
            Tag.OUTPUT_LIMIT: self.output_limit,
            Tag.APPLET: int(self.applet),
            Tag.NOFILE: self.nofile,
        }
        if self.kept:
            fields[Tag.KEPT] = 1
        if self.tty is not None:
            fields |= {Tag.TTY: 1, Tag.ROWS: self.tty[0], Tag.COLUMNS: self.tty[1]}
        return fields


@dataclass(frozen=True)
class Exit:
    """The end of a command.

    Attributes:
        status: As of wait(2).
        stdout_bytes, stderr_bytes: That it wrote, kept or not.
        timed_out: Which of its times it exceeded.
        started_ns, ended_ns: Since 1970, by the clock of the box.
        user_us, system_us: Processor time of it and what it waited for.
        max_rss_kb: Largest memory of any of those.
        oom_kills: Processes that the box's own kernel killed meanwhile, for want of memory.
    """

    status: int
    stdout_bytes: int
    stderr_bytes: int
    timed_out: TimedOut
    started_ns: int
    ended_ns: int
    user_us: int
    system_us: int
    max_rss_kb: int
    oom_kills: int = 0


class OutputSink(Protocol):
    """Takes the output of a command as it comes."""

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take bytes of stream 1 or 2. An offset beyond the last end means that bytes are missing."""


class GuestCommand:
    """A command in a guest.

    Attributes:
        id: Its number in the box.
        sink: Where its output goes.
        started: Done when it runs, with its pid in the box; CommandRefusedError if it does not.
        ended: Done with its `Exit` when it and its output have ended.
    """

    def __init__(self, guest: "Guest", number: int, sink: OutputSink) -> None:
        loop = asyncio.get_running_loop()
        self.id = number
        self.sink = sink
        self.started: asyncio.Future[int] = loop.create_future()
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self._guest = guest
        self._sent = 0
        self._taken = 0
        self._acknowledged = [0, 0]
        self._received = [0, 0]
        self._received_max = 0
        self._room = asyncio.Event()
        self._room.set()

    async def write(self, data: bytes | memoryview) -> None:
        """Give it input; waits where it takes none. What it does not read before its end is lost."""
        at = 0
        while at < len(data) and not self.ended.done():
            room = WINDOW - (self._sent - self._taken)
            if room <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            part = bytes(data[at : at + min(room, 64 * 1024)])
            self._guest.send(Frame.INPUT, self.id, part)
            self._sent += len(part)
            at += len(part)
            await self._guest.drain()

    def end_input(self) -> None:
        """Close its input."""
        self._guest.send(Frame.INPUT_END, self.id)

    def signal(self, number: int) -> None:
        """Signal its process group; SIGKILL reaches its whole session."""
        self._guest.send(Frame.SIGNAL, self.id, encode_fields({Tag.SIGNAL: number}))

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal."""
        fields = encode_fields({Tag.ROWS: rows, Tag.COLUMNS: columns})
        self._guest.send(Frame.RESIZE, self.id, fields)

    def expect(self, stdout: int, stderr: int, limit: int) -> None:
        """Say where its output begins, and how much of each stream may come; 0 for any amount."""
        self._acknowledged = [stdout, stderr]
        self._received = [stdout, stderr]
        self._received_max = limit

    def take_output(self, stream: int, payload: bytes) -> None:
        """Pass output on. More than a guest may send is an error: our memory and disk are not the box's."""
        if len(payload) < 8:
            raise WireError(f"output of {len(payload)} bytes without an offset")
        index, data = stream - 1, payload[8:]
        received = self._received[index] = self._received[index] + len(data)
        limit = self._received_max
        if received - self._acknowledged[index] > WINDOW + TAIL or 0 < limit < received - TAIL:
            raise WireError(f"{received} bytes of stream {stream}, more than it may send")
        self.sink.output(stream, int.from_bytes(payload[:8], "little"), data)

    def acknowledge(self, stdout: int, stderr: int) -> None:
        """Say that output up to these offsets is kept safe: the guest lets go of it."""
        # Of output with a gap, which a guest has that nobody listened to, less than that has come.
        self._acknowledged = [
            max(a, b) for a, b in zip(self._acknowledged, (stdout, stderr), strict=True)
        ]
        fields = encode_fields({Tag.OUT_OFFSET: stdout, Tag.ERR_OFFSET: stderr})
        self._guest.send(Frame.ACK, self.id, fields)

    def forget(self) -> None:
        """Say that its end is kept safe: the guest forgets it."""
        self._guest.forget(self.id)

    def input_taken(self, offset: int) -> None:
        """The guest has passed on input up to this offset."""
        self._taken = offset
        self._room.set()

    def lost(self, error: Exception) -> None:
        """The guest is gone."""
        self._room.set()
        for future in (self.started, self.ended):
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits sees it; nobody has to


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
        self._settling: asyncio.Future[dict[int, bytes]] | None = None
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()

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
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, guest = await loop.create_unix_connection(lambda: cls(port=port), str(path))
                guest._hello()
                await asyncio.shield(guest._welcome)
        except (OSError, TimeoutError) as error:
            raise GuestLostError(
                f"no guest answers at {path}: {str(error) or 'no answer'}"
            ) from error
        return guest

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
        """Called by asyncio: every command that has not ended is lost."""
        error = GuestLostError(f"the guest is gone: {exc}" if exc else "the guest is gone")
        for command in self.commands.values():
            command.lost(error)
        for future in (self._welcome, self._listing, self._settling):
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
        if self._transport is not None and not self._transport.is_closing():
            frame = encode_frame(kind, command, payload)
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

    def forget(self, number: int) -> None:
        """Drop an ended command here and there."""
        if self.commands.pop(number, None) is not None:
            self.send(Frame.FORGET, number)

    async def list(self) -> dict[int, bool]:
        """Return the commands that the guest knows, and whether each has ended."""
        self._listed = {}
        self._listing = asyncio.get_running_loop().create_future()
        self.send(Frame.LIST, 0)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._listing
        except TimeoutError:
            self.close()
            raise GuestLostError(f"the guest does not list its commands in {_ANSWER_S} s") from None
        finally:
            self._listing = None

    async def settle(self, fields: Fields) -> None:
        """Tell a virtual machine who it is.

        Raises:
            GuestLostError: It does not do it.
        """
        self._settling = asyncio.get_running_loop().create_future()
        self.send(Frame.SETTLE, 0, encode_fields(fields))
        try:
            async with asyncio.timeout(_ANSWER_S):
                answer = await self._settling
        except TimeoutError:
            self.close()
            raise GuestLostError(f"the machine does not settle in {_ANSWER_S} s") from None
        finally:
            self._settling = None
        if Tag.ERRNO in answer:
            what = answer.get(Tag.TEXT, b"")[:200].decode(errors="replace")
            raise GuestLostError(
                f"the machine cannot settle: {what}: {os.strerror(_small(answer, Tag.ERRNO))}"
            )

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
            case Frame.SETTLED if self._settling is not None and not self._settling.done():
                self._settling.set_result(decode_fields(payload))
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

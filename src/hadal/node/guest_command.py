"""A command in a guest: what it is to run, its output and input, and its end."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hadal.node.wire import TAIL, WINDOW, Fields, Frame, Tag, TimedOut, WireError, encode_fields

if TYPE_CHECKING:
    from hadal.node.guest import Guest

__all__ = ["CommandOrder", "Exit", "GuestCommand", "OutputSink", "Unread"]


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
        kept: Whether it has the descriptors that the box was made with, as numbers 4 and 5; in a machine that
            of what it has changed.
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

    def place(self) -> bytes:
        """Return the fields by which its output comes again from where it is not kept safe: the guest lets go before."""
        self._received = list(self._acknowledged)
        out, err = self._acknowledged
        return encode_fields({Tag.OUT_OFFSET: out, Tag.ERR_OFFSET: err})

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


class Unread:
    """Takes output that nobody wants, so that the command does not wait for somebody who does.

    Args:
        keep: Bytes of its end that are kept all the same.

    Attributes:
        command: To be set to the command whose output it is.
        end: What is kept.
    """

    def __init__(self, keep: int = 0) -> None:
        self.command: GuestCommand | None = None
        self.end = bytearray()
        self._keep = keep
        self._offsets = [0, 0]

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take what comes and forget what is old."""
        self.end += data
        del self.end[: max(0, len(self.end) - self._keep)]
        self._offsets[stream - 1] = offset + len(data)
        if self.command is not None:
            self.command.acknowledge(*self._offsets)

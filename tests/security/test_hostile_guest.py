"""A guest that has been taken over: whatever it sends, the node daemon names the fault and lives."""

import asyncio
import contextlib
import resource
import struct

import pytest

from hadal.errors import CommandRefusedError
from hadal.node.guest import Guest, GuestLostError
from hadal.node.guest_command import CommandOrder
from hadal.node.wire import HEADER, WINDOW, Frame, Tag, encode_fields, encode_frame

WELCOME = encode_frame(
    Frame.WELCOME, 0, encode_fields({Tag.VERSION: 1, Tag.BOOT_ID: b"ab" * 16, Tag.LAST_ID: 0})
)


class Sink:
    """Counts output, and remembers the largest piece."""

    def __init__(self):
        self.bytes = 0

    def output(self, stream, offset, data):
        self.bytes += len(data)


def talk(tmp_path, script, body):
    """Run a fake guest that says WELCOME and then what the script does, and a body with our side of it."""

    async def main():
        path = tmp_path / "guest"
        clients = []

        async def serve(reader, writer):
            clients.append(writer)
            with contextlib.suppress(ConnectionError):
                await script(reader, writer)

        async with asyncio.timeout(30), await asyncio.start_unix_server(serve, path):
            await body(path)
            for writer in clients:
                writer.close()

    asyncio.run(main())


async def read_frame(reader):
    length, *_ = HEADER.unpack(await reader.readexactly(HEADER.size))
    await reader.readexactly(length)


async def welcome(reader, writer):
    await read_frame(reader)
    writer.write(WELCOME)


def frame(kind, number, payload, length=None):
    return HEADER.pack(len(payload) if length is None else length, kind, 0, number) + payload


FAULTS = {
    "a frame that is too long": frame(Frame.STDOUT, 1, b"", length=1 << 31),
    "an unknown type": frame(999, 1, b""),
    "a type of ours": frame(Frame.EXEC, 1, b""),
    "a field beyond the payload": frame(Frame.EXIT, 1, struct.pack("<HI", Tag.STATUS, 1 << 30)),
    "half a field": frame(Frame.EXIT, 1, b"\1\2\3"),
    "a field twice": frame(Frame.EXIT, 1, encode_fields({Tag.STATUS: [1, 2]})),
    "a status that is none": frame(Frame.EXIT, 1, encode_fields({Tag.STATUS: 1 << 63})),
    "an error that is none": frame(Frame.FAILED, 1, encode_fields({Tag.ERRNO: (1 << 64) - 1})),
    "a timeout that is none": frame(Frame.EXIT, 1, encode_fields({Tag.STATUS: 0, Tag.TIMED_OUT: 77})),
    "output without an offset": frame(Frame.STDOUT, 1, b"abc"),
    "more than the window": b"".join(
        frame(Frame.STDOUT, 1, struct.pack("<Q", i * 65536) + bytes(65536)) for i in range(5)
    ),
    "more tail than there is": b"".join(
        frame(Frame.STDERR, 1, struct.pack("<Q", 1 << 60) + bytes(65536)) for i in range(5)
    ),
    "not its name": frame(Frame.WELCOME, 0, encode_fields({Tag.BOOT_ID: b"\xff\xfe"})),
    "an error of its own": frame(Frame.ERROR, 0, encode_fields({Tag.TEXT: b"\xff" * 1000})),
    "noise": bytes(range(256)) * 100,
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_connection_by_name(tmp_path, fault):
    async def script(reader, writer):
        await welcome(reader, writer)
        await read_frame(reader)  # the command is there
        writer.write(FAULTS[fault])
        await reader.read()

    async def body(path):
        guest = await Guest.connect(path)
        command = guest.execute(1, CommandOrder(arguments=[b"true"]), Sink())
        with pytest.raises(GuestLostError, match="broke the protocol"):
            await command.ended
        await guest.lost
        late = guest.execute(2, CommandOrder(arguments=[b"true"]), Sink())
        with pytest.raises(GuestLostError):
            await late.ended

    talk(tmp_path, script, body)


@pytest.mark.parametrize("cut", range(0, len(WELCOME), 7))
def test_a_welcome_that_is_cut_off(tmp_path, cut):
    async def script(reader, writer):
        await reader.readexactly(HEADER.size)
        writer.write(WELCOME[:cut])
        await writer.drain()
        writer.close()

    async def body(path):
        with pytest.raises(GuestLostError):
            await Guest.connect(path)

    talk(tmp_path, script, body)


def test_a_guest_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch):
    async def silent(reader, writer):
        await reader.read()

    async def connect(path):
        with pytest.raises(GuestLostError, match="no answer"):
            await Guest.connect(path, timeout_s=0.2)

    talk(tmp_path, silent, connect)
    (tmp_path / "guest").unlink(missing_ok=True)
    monkeypatch.setattr("hadal.node.guest._ANSWER_S", 0.2)

    async def welcomes_only(reader, writer):
        await welcome(reader, writer)
        await reader.read()

    async def list_commands(path):
        guest = await Guest.connect(path)
        with pytest.raises(GuestLostError, match="does not list"):
            await guest.list()
        await guest.lost

    talk(tmp_path, welcomes_only, list_commands)


def test_late_and_repeated_frames_do_no_harm(tmp_path):
    done = frame(Frame.EXIT, 1, encode_fields({Tag.STATUS: 0, Tag.OUT_TOTAL: 0}))
    odd = b"".join(
        (
            frame(Frame.LISTED, 0, b""), frame(Frame.COMMAND, 7, b""), frame(Frame.PONG, 3, b""),
            frame(Frame.EXIT, 99, encode_fields({Tag.STATUS: 0})), frame(Frame.STDOUT, 98, bytes(8)),
            frame(Frame.STARTED, 1, encode_fields({Tag.PID: (1 << 64) - 1})) * 3, WELCOME,
        )
    )  # fmt: skip

    async def script(reader, writer):
        await welcome(reader, writer)
        await read_frame(reader)
        writer.write(odd + done * 3 + odd)
        await reader.read()

    async def body(path):
        guest = await Guest.connect(path)
        command = guest.execute(1, CommandOrder(arguments=[b"true"]), Sink())
        assert (await command.ended).status == 0
        await asyncio.sleep(0.05)
        assert not guest.lost.done()
        guest.close()

    talk(tmp_path, script, body)


def test_a_flood_is_not_kept(tmp_path):
    """Frames without an end: nothing of them stays, and the loop goes on with other work."""

    async def script(reader, writer):
        await welcome(reader, writer)
        flood = frame(Frame.COMMAND, 5, b"") * 1000 + frame(Frame.STDOUT, 77, bytes(WINDOW - 8))
        while True:
            writer.write(flood)
            await writer.drain()

    async def body(path):
        guest = await Guest.connect(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loop = asyncio.get_running_loop()
        worst, end = 0.0, loop.time() + 1
        while loop.time() < end:
            began = loop.time()
            await asyncio.sleep(0.001)
            worst = max(worst, loop.time() - began)
        assert worst < 0.5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
        guest.close()

    talk(tmp_path, script, body)


def test_what_does_not_fit_into_a_frame_is_refused_here(tmp_path):
    async def body(path):
        guest = await Guest.connect(path)
        order = CommandOrder(arguments=[b"x" * 300_000])
        with pytest.raises(CommandRefusedError):
            await guest.execute(1, order, Sink()).ended
        assert not guest.lost.done()
        guest.close()

    async def script(reader, writer):
        await welcome(reader, writer)
        await reader.read()

    talk(tmp_path, script, body)

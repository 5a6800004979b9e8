"""Frames between the node daemon and a guest: the twin of guest/protocol.h.

A frame is `u32 length | u16 type | u16 zero | u64 command id | payload`; a payload is raw bytes (with an
offset before them for output) or fields `u16 tag | u32 length | value`. docs/formats/guest-protocol.md
says what each one means.
"""

import enum
import struct
from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "HEADER",
    "PROTOCOL_VERSION",
    "TAIL",
    "WINDOW",
    "Event",
    "Fields",
    "Frame",
    "PortReader",
    "Tag",
    "TimedOut",
    "WireError",
    "decode_fields",
    "encode_fields",
    "encode_frame",
    "iterate_fields",
    "port_bytes",
]

PROTOCOL_VERSION = 1
HEADER = struct.Struct("<IHHQ")
WINDOW = 256 * 1024
"""Unacknowledged bytes, each stream and direction."""
TAIL = 16 * 1024
"""Bytes kept of what a command writes beyond its limit."""
_BEGIN, _ESCAPE, _FLIP = b"\x7e", b"\x7d", 0x20
_FIELD = struct.Struct("<HI")
_NUMBER = struct.Struct("<Q")


class Frame(enum.IntEnum):
    """Types of frames."""

    HELLO = 1
    EXEC = 2
    INPUT = 3
    INPUT_END = 4
    RESIZE = 5
    SIGNAL = 6
    ATTACH = 7
    ACK = 8
    FORGET = 9
    LIST = 10
    PING = 11
    SETTLE = 12
    WELCOME = 64
    STARTED = 65
    FAILED = 66
    STDOUT = 67
    STDERR = 68
    EXIT = 69
    INPUT_ACK = 70
    COMMAND = 71
    LISTED = 72
    PONG = 73
    ERROR = 74
    SETTLED = 75


class Tag(enum.IntEnum):
    """Names of fields. Values are numbers (u64) or bytes."""

    VERSION_MIN = 1
    VERSION_MAX = 2
    VERSION = 3
    BOOT_ID = 4
    ERRNO = 5
    TEXT = 6
    PID = 7
    TIME = 8
    STATUS = 9
    OUT_TOTAL = 10
    ERR_TOTAL = 11
    TIMED_OUT = 12
    USER_US = 13
    SYSTEM_US = 14
    MAX_RSS_KB = 15
    OUT_OFFSET = 16
    ERR_OFFSET = 17
    OFFSET = 18
    SIGNAL = 19
    ROWS = 20
    COLUMNS = 21
    START_TIME = 22
    LAST_ID = 23
    NONCE = 24
    OOM_KILLS = 25
    ARGUMENT = 32
    ENVIRONMENT = 33
    DIRECTORY = 34
    USER = 35
    TTY = 36
    INPUT = 37
    TIMEOUT_MS = 38
    QUIET_MS = 39
    OUTPUT_LIMIT = 40
    APPLET = 41
    NOFILE = 42
    KEPT = 43
    REQUEST = 64
    HOSTNAME = 65
    LOWER = 66
    SCRATCH = 67
    SCRATCH_BYTES = 68
    SCRATCH_INODES = 69
    RUN_DIRECTORY = 70
    SOCKET = 71
    UID_BASE = 72
    UID_COUNT = 73
    CGROUP = 74
    NETNS = 75
    SHM_BYTES = 76
    FILE = 77
    BIND = 78
    VOLATILE = 79
    RLIMIT = 81
    TMPFS = 82
    READ_ONLY = 83
    LEASE_S = 84
    KEEP = 85
    DEVICE = 86
    PHASE = 96
    ELAPSED_US = 97
    EVENT = 98
    SEED = 112
    HELD = 113
    NETWORK = 114
    ADJUST = 115
    PATH = 128
    MODE = 130
    SIZE = 131
    MTIME = 132
    CTIME = 133
    UID = 134
    GID = 135
    KIND = 136
    COOKIE = 139
    MASK = 140
    LINK_TARGET = 141
    LENGTH = 149


class PortReader:
    """Takes apart what comes through the port of a virtual machine, where no connection begins or ends.

    What is before the first beginning belongs to nobody. The twin of guest/port.c.
    """

    def __init__(self) -> None:
        self._begun = False
        self._escaped = False

    def read(self, data: bytes) -> list[bytes]:
        """Return the bytes of the connection that goes on, and of each one that begins in these."""
        passages = data.split(_BEGIN)
        found: list[bytes] = []
        for number, passage in enumerate(passages):
            if number:
                self._begun, self._escaped = True, False
            found.append(self._unescape(passage) if self._begun else b"")
        return found

    def _unescape(self, data: bytes) -> bytes:
        first, *rest = data.split(_ESCAPE)
        parts = [first]
        if self._escaped and first:
            parts = [bytes([first[0] ^ _FLIP]), first[1:]]
            self._escaped = False
        for part in rest:
            if part:
                parts += (bytes([part[0] ^ _FLIP]), part[1:])
        if rest and not rest[-1]:
            self._escaped = True
        return b"".join(parts)


def port_bytes(data: bytes, *, begins: bool = False) -> bytes:
    """Return frames as they go through a port; the first ones of a connection begin it."""
    data = data.replace(_ESCAPE, _ESCAPE + bytes([_ESCAPE[0] ^ _FLIP]))
    data = data.replace(_BEGIN, _ESCAPE + bytes([_BEGIN[0] ^ _FLIP]))
    return _BEGIN + data if begins else data


class TimedOut(enum.IntEnum):
    """Which of its times a command has exceeded."""

    NO = 0
    LIFE = 1
    QUIET = 2


class Event(enum.IntEnum):
    """What the launcher reports."""

    CLONED = 1
    READY = 2
    FAILED = 3
    EXITED = 4


class WireError(ValueError):
    """Bytes that are not of this protocol. Internal: the connection ends, and its owner says why."""


Value = int | bytes
Fields = Mapping[Tag, Value | Sequence[Value]]


def encode_fields(fields: Fields) -> bytes:
    """Return fields as bytes; a sequence becomes one field for each item."""
    parts: list[bytes] = []
    for tag, value in fields.items():
        for item in (value,) if isinstance(value, int | bytes) else value:
            data = _NUMBER.pack(item) if isinstance(item, int) else item
            parts += (_FIELD.pack(tag, len(data)), data)
    return b"".join(parts)


def encode_frame(kind: Frame, command: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return HEADER.pack(len(payload), kind, 0, command) + payload


def iterate_fields(payload: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    """Yield tag and value of each field.

    Raises:
        WireError: A field goes beyond the payload.
    """
    at = 0
    end = len(payload)
    while at < end:
        if end - at < _FIELD.size:
            raise WireError(f"{end - at} bytes left where a field begins")
        tag, length = _FIELD.unpack_from(payload, at)
        at += _FIELD.size
        if end - at < length:
            raise WireError(f"a field of {length} bytes, of which {end - at} are there")
        yield tag, bytes(payload[at : at + length])
        at += length


def decode_fields(payload: bytes | memoryview) -> dict[int, bytes]:
    """Return the fields of a payload in which each occurs once.

    Raises:
        WireError: As `iterate_fields`, or a field occurs twice.
    """
    fields: dict[int, bytes] = {}
    for tag, value in iterate_fields(payload):
        if tag in fields:
            raise WireError(f"field {tag} occurs twice")
        fields[tag] = value
    return fields

"""Netlink messages: as much of the kernel's network interface as boxes need, and no more.

A message is a header, a fixed part and attributes, everything in the machine's byte order unless its
kind says otherwise. links.py, nftables.py, connections.py and denials.py say which messages; here are
only bytes and sockets. A general library does the same 5 to 10 times slower (dev/LOG.md).
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "ACK",
    "CREATE",
    "DUMP",
    "EXCLUSIVE",
    "NETFILTER",
    "REQUEST",
    "Message",
    "NetlinkError",
    "NetlinkSocket",
    "attribute",
    "big_u32",
    "big_u64",
    "nested",
    "read_attributes",
    "text",
    "u32",
]

REQUEST = 0x1
ACK = 0x4
EXCLUSIVE = 0x200
DUMP = 0x300
CREATE = 0x400
NETFILTER = 12
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_RECEIVE_BYTES = 256 * 1024
_TIMEOUT_S = 30.0


class NetlinkError(OSError):
    """The kernel refused a message. Internal: whoever sent it says what it was for."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        kind: Its type.
        body: Fixed part and attributes.
        flags: Beside REQUEST.
        what: For the error when it is refused.
    """

    kind: int
    body: bytes
    flags: int = 0
    what: str = ""


def attribute(kind: int, data: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)


def nested(kind: int, *children: bytes) -> bytes:
    """Return an attribute of attributes."""
    return attribute(kind | _NESTED, b"".join(children))


def u32(kind: int, number: int) -> bytes:
    """Return an attribute of 32 bits in the machine's byte order."""
    return attribute(kind, struct.pack("=I", number))


def big_u32(kind: int, number: int) -> bytes:
    """Return an attribute of 32 bits in the network's byte order; a negative number wraps."""
    return attribute(kind, struct.pack("!I", number & 0xFFFFFFFF))


def big_u64(kind: int, number: int) -> bytes:
    """Return an attribute of 64 bits in the network's byte order."""
    return attribute(kind, struct.pack("!Q", number))


def text(kind: int, value: str) -> bytes:
    """Return an attribute of text, ended by a zero byte."""
    return attribute(kind, value.encode() + b"\0")


def read_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and data of each attribute."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


class NetlinkSocket:
    """A netlink socket of the network namespace that the calling thread is in. For one thread at a time.

    Args:
        protocol: `socket.NETLINK_ROUTE` or NETFILTER.

    Raises:
        OSError: The kernel lacks the protocol.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._socket.bind((0, 0))
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, messages: Sequence[Message]) -> None:
        """Send messages in one system call and wait until the kernel has done the last.

        Raises:
            NetlinkError: The first that was refused; the others are done, unless they are a batch.
        """
        first = self._sequence + 1
        parts: list[bytes] = []
        for message in messages:
            self._sequence += 1
            length = _HEADER.size + len(message.body)
            flags = message.flags | REQUEST
            parts += (
                _HEADER.pack(length, message.kind, flags, self._sequence, 0),
                message.body,
                bytes(-length % 4),
            )
        self._socket.send(b"".join(parts))
        last = first + max((i for i, m in enumerate(messages) if m.flags & ACK), default=-1)
        failed: NetlinkError | None = None
        while last >= first:
            for kind, sequence, body in self._receive():
                if kind != _ERROR or sequence < first:
                    continue
                code = -int(struct.unpack_from("=i", body)[0])
                if code and failed is None:
                    what = messages[sequence - first].what
                    failed = NetlinkError(code, f"{what}: {os.strerror(code)}")
                if sequence == last:
                    last = -1
        if failed is not None:
            raise failed

    def ask(self, message: Message) -> list[bytes]:
        """Send a question and return the bodies of its answers.

        Raises:
            NetlinkError: It was refused.
        """
        self._sequence += 1
        header = _HEADER.pack(
            _HEADER.size + len(message.body),
            message.kind,
            message.flags | REQUEST,
            self._sequence,
            0,
        )
        self._socket.send(header + message.body)
        answers: list[bytes] = []
        while True:
            for kind, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == _ERROR and (code := -int(struct.unpack_from("=i", body)[0])):
                    raise NetlinkError(code, f"{message.what}: {os.strerror(code)}")
                if kind in (_ERROR, _DONE):
                    return answers
                answers.append(body)
                if not message.flags & (DUMP | ACK):
                    return answers

    def read(self) -> list[tuple[int, bytes]]:
        """Return type and body of messages that came unasked, without waiting for any.

        Raises:
            OSError: Some are lost: they came faster than they were read.
        """
        try:
            self._socket.setblocking(False)
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        return [(kind, body) for kind, _, body in _iterate_messages(data)]

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        return _iterate_messages(self._socket.recv(_RECEIVE_BYTES))


def _iterate_messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, sequence number and body of each message received."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, sequence, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3

"""The packet filter: rules as text through libnftables, elements of sets by netlink.

Both are transactions: all of one call happens at once, or nothing. With 2,000 boxes, seven elements
take 0.1 to 0.5 ms by netlink, 2 ms through the library and 9 ms by the program `nft`; rules are rare
and better read as text (dev/LOG.md).
"""

import ctypes
import errno
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hadal.errors import NodeError, UnsupportedError
from hadal.node.network.netlink import (
    ACK,
    CREATE,
    DUMP,
    NETFILTER,
    Message,
    NetlinkError,
    NetlinkSocket,
    attribute,
    big_u32,
    big_u64,
    nested,
    read_attributes,
    text,
)

__all__ = ["Element", "FilterTable", "RuleLibrary", "Tally"]

_SUBSYSTEM = 10 << 8
_BEGIN, _END = 0x10, 0x11
_GETCHAIN, _NEWSETELEM, _GETSETELEM, _DELSETELEM = (_SUBSYSTEM | n for n in (4, 12, 13, 14))
_INET_FAMILY = 1
_GENERIC = struct.Struct("!BBH")
_TABLE, _CHAIN_NAME = 1, 3
_SET, _ELEMENTS, _ITEM = 2, 3, 1
_KEY, _DATA, _TIMEOUT, _EXPRESSION = 1, 2, 4, 7
_VALUE, _VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_EXPRESSION_DATA, _COUNTER_BYTES, _COUNTER_PACKETS = 2, 1, 2
_GOTO = -4
_LIBRARY = "libnftables.so.1"


@dataclass(frozen=True, slots=True)
class Element:
    """One element of a set or map.

    Attributes:
        set: Name of the set.
        key: Fields, each padded to four bytes.
        value: What a map says for it.
        goto: The chain where a verdict map sends it, instead.
        timeout_ms: Milliseconds until it goes by itself; 0 is never.
    """

    set: str
    key: bytes
    value: bytes | None = None
    goto: str | None = None
    timeout_ms: int = 0

    def encoded(self) -> bytes:
        """Return its attributes."""
        parts = [nested(_KEY, attribute(_VALUE, self.key))]
        if self.value is not None:
            parts.append(nested(_DATA, attribute(_VALUE, self.value)))
        if self.goto is not None:
            chain = text(_VERDICT_CHAIN, self.goto)
            parts.append(nested(_DATA, nested(_VERDICT, big_u32(_VERDICT_CODE, _GOTO), chain)))
        if self.timeout_ms:
            parts.append(big_u64(_TIMEOUT, self.timeout_ms))
        return nested(_ITEM, *parts)


@dataclass(frozen=True, slots=True)
class Tally:
    """What a counter has counted.

    Attributes:
        bytes: Of packets, headers of the internet protocol included.
        packets: Packets.
    """

    bytes: int = 0
    packets: int = 0


class FilterTable:
    """The sets of one table, in the network namespace that the calling thread is in. For one thread.

    Args:
        name: Of the table, of family inet.

    Raises:
        OSError: The kernel has no netfilter.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._socket = NetlinkSocket(NETFILTER)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def change(self, *, delete: Iterable[Element] = (), add: Iterable[Element] = ()) -> None:
        """Delete elements, then add elements, in one transaction.

        What has a timeout may be there or not: deleting it does no harm, adding it renews it.

        Raises:
            NetlinkError: One cannot be deleted or added; nothing is changed.
        """
        steps: list[Message] = []
        for element in delete:
            steps += self._delete(element)
        for element in add:
            if element.timeout_ms:
                steps += self._delete(element)
            steps.append(self._message(_NEWSETELEM, element))
        if not steps:
            return
        try:
            self._send(steps)
        except NetlinkError as error:
            # Kernels before 6.8 look at the clock anew for each step of a transaction.
            if error.errno != errno.ENOENT:
                raise
            self._send(steps)

    def elements(self, set_name: str) -> list[Element]:
        """Return the elements of a set or map, without timeouts."""
        body = self._body() + text(_SET, set_name)
        bodies = self._socket.ask(Message(_GETSETELEM, body, DUMP, f"list set {set_name}"))
        return [_read_element(set_name, item) for b in bodies for item in _items(b)]

    def tally(self, set_name: str, key: bytes) -> Tally:
        """Return the counter of one element; nothing counted where there is no such element."""
        message = self._message(_GETSETELEM, Element(set_name, key))
        try:
            bodies = self._socket.ask(Message(_GETSETELEM, message.body, 0, message.what))
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return Tally()
            raise
        for item in (item for body in bodies for item in _items(body)):
            expression = dict(read_attributes(dict(read_attributes(item)).get(_EXPRESSION, b"")))
            counter = dict(read_attributes(expression.get(_EXPRESSION_DATA, b"")))
            if _COUNTER_BYTES in counter:
                return Tally(
                    int.from_bytes(counter[_COUNTER_BYTES], "big"),
                    int.from_bytes(counter[_COUNTER_PACKETS], "big"),
                )
        return Tally()

    def chains(self) -> set[str]:
        """Return the names of the table's chains; none where there is no such table."""
        bodies = self._socket.ask(Message(_GETCHAIN, self._body(), DUMP, "list chains"))
        found: set[str] = set()
        for body in bodies:
            fields = dict(read_attributes(body[_GENERIC.size :]))
            if fields.get(_TABLE) == self._name.encode() + b"\0":
                found.add(fields[_CHAIN_NAME].rstrip(b"\0").decode())
        return found

    def _body(self) -> bytes:
        return _GENERIC.pack(_INET_FAMILY, 0, 0) + text(_TABLE, self._name)

    def _message(self, kind: int, element: Element) -> Message:
        body = self._body() + text(_SET, element.set) + nested(_ELEMENTS, element.encoded())
        flags = CREATE if kind == _NEWSETELEM else 0
        return Message(kind, body, flags, f"set {element.set} of table {self._name}")

    def _delete(self, element: Element) -> list[Message]:
        gone = Element(element.set, element.key)
        first = [self._message(_NEWSETELEM, element)] if element.timeout_ms else []
        return [*first, self._message(_DELSETELEM, gone)]

    def _send(self, steps: Sequence[Message]) -> None:
        last = steps[-1]
        limit = _GENERIC.pack(0, 0, _SUBSYSTEM >> 8)
        acknowledged = Message(last.kind, last.body, last.flags | ACK, last.what)
        self._socket.send([Message(_BEGIN, limit), *steps[:-1], acknowledged, Message(_END, limit)])


def _items(body: bytes) -> Iterator[bytes]:
    elements = dict(read_attributes(body[_GENERIC.size :])).get(_ELEMENTS, b"")
    return (item for _, item in read_attributes(elements))


def _read_element(set_name: str, item: bytes) -> Element:
    fields = dict(read_attributes(item))
    key = dict(read_attributes(fields[_KEY]))[_VALUE]
    data = dict(read_attributes(fields.get(_DATA, b"")))
    verdict = dict(read_attributes(data.get(_VERDICT, b"")))
    chain = verdict.get(_VERDICT_CHAIN)
    goto = None if chain is None else chain.rstrip(b"\0").decode()
    return Element(set_name, key, value=data.get(_VALUE), goto=goto)


class RuleLibrary:
    """libnftables, in the network namespace that the calling thread is in. For one thread.

    Raises:
        UnsupportedError: The library is not installed.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise UnsupportedError(
                f"networks of boxes need {_LIBRARY}, which is not there: {error}",
                hint="apt-get install nftables, or dnf install nftables",
            ) from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._library = library
        self._context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_error(self._context)

    def close(self) -> None:
        """Free the library's memory."""
        self._library.nft_ctx_free(self._context)
        self._context = ctypes.c_void_p()

    def run(self, rules: str) -> None:
        """Carry out rules, as `nft -f` does, in one transaction.

        Raises:
            NodeError: They are refused; nothing is changed.
        """
        if self._library.nft_run_cmd_from_buffer(self._context, rules.encode()) != 0:
            said = self._library.nft_ctx_get_error_buffer(self._context).decode(errors="replace")
            raise NodeError(f"nftables refused rules: {said.strip()[:2000]}")

"""Asking the node's own resolvers."""

import asyncio
import struct
from collections.abc import Sequence
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdatatype

__all__ = ["Upstream", "system_resolvers"]

_UDP_BYTES = 1232
_LENGTH = struct.Struct("!H")


def system_resolvers(path: Path = Path("/etc/resolv.conf")) -> tuple[str, ...]:
    """Return the resolvers of this machine, as addresses; none where the file says none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    words = [line.split() for line in lines]
    return tuple(w[1] for w in words if len(w) > 1 and w[0] == "nameserver")


class _Reply(asyncio.DatagramProtocol):
    """Waits for the one datagram that answers a question; others may be forged and are left out."""

    def __init__(self, question: dns.message.Message) -> None:
        self._question = question
        self.answer: asyncio.Future[dns.message.Message] = (
            asyncio.get_running_loop().create_future()
        )

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        response = _read(data)
        if response and self._question.is_response(response) and not self.answer.done():
            self.answer.set_result(response)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


class Upstream:
    """The resolvers that the node asks, one after the other until one answers.

    Args:
        addresses: Where they are.
        timeout_s: Seconds until the next one is asked.
        port: Where they listen.
    """

    def __init__(self, addresses: Sequence[str], *, timeout_s: float = 2.0, port: int = 53) -> None:
        self._addresses = tuple(addresses)
        self._timeout_s = timeout_s
        self._port = port

    async def ask(self, name: str, kind: dns.rdatatype.RdataType) -> dns.message.Message | None:
        """Return what a resolver says, or None where none answers in time."""
        question = dns.message.make_query(
            dns.name.from_text(name), kind, use_edns=0, payload=_UDP_BYTES
        )
        for address in self._addresses * 2:
            try:
                async with asyncio.timeout(self._timeout_s):
                    response = await self._ask_udp(question, address)
                    if response.flags & dns.flags.TC:
                        response = await self._ask_tcp(question, address)
                    return response
            except (OSError, EOFError, TimeoutError):
                continue
        return None

    async def _ask_udp(self, question: dns.message.Message, address: str) -> dns.message.Message:
        # A socket for each question: a port of its own makes answers hard to forge.
        transport, reply = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Reply(question), remote_addr=(address, self._port)
        )
        try:
            transport.sendto(question.to_wire())
            return await reply.answer
        finally:
            transport.close()

    async def _ask_tcp(self, question: dns.message.Message, address: str) -> dns.message.Message:
        reader, writer = await asyncio.open_connection(address, self._port)
        try:
            wire = question.to_wire()
            writer.write(_LENGTH.pack(len(wire)) + wire)
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            response = _read(await reader.readexactly(length))
            if response is None or not question.is_response(response):
                raise OSError("not an answer to the question")
            return response
        finally:
            writer.close()


def _read(data: bytes) -> dns.message.Message | None:
    try:
        return dns.message.from_wire(data, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        return None

"""The resolver of all boxes: answers what their policies allow, and opens the filter before it does."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import dns.message
import dns.rcode
import dns.rdatatype

from hadal.node.network.answers import (
    Chain,
    Question,
    answer,
    follow,
    read_question,
    refusal,
    to_wire,
)
from hadal.node.network.boxes import BoxState
from hadal.node.network.shares import Shares
from hadal.node.network.upstream import Upstream

__all__ = ["Resolver"]

_PENDING_MAX, _ALL_PENDING_MAX = 64, 2048
"""Questions that wait for an answer, of a box and of all: each has a socket, and the daemon needs files, too."""
_STREAMS_MAX, _ALL_STREAMS_MAX = 8, 1024
_STREAM_IDLE_S = 10.0
_LENGTH = struct.Struct("!H")
_NOT_ALLOWED = "the policy of the box does not allow this name"
_PRIVATE = "it leads to addresses that a name cannot allow"
_NO_ANSWER = "no resolver of the node answers"
_FULL = "the box knows too many addresses"
Admit = Callable[[BoxState, str, Collection[IPv4Address], int], Awaitable[bool]]


class Resolver(asyncio.DatagramProtocol):
    """Answers over UDP and TCP. A box that waits for a slow upstream holds up nobody else.

    Args:
        boxes: By address.
        upstream: Whom to ask.
        never: What no answer may contain.
        admit: Opens the filter for a box to the addresses of a name, for so many seconds; False
            where it has too many.
    """

    def __init__(
        self,
        boxes: Mapping[IPv4Address, BoxState],
        upstream: Upstream,
        never: Collection[IPv4Network],
        admit: Admit,
    ) -> None:
        self._boxes = boxes
        self._upstream = upstream
        self._never = never
        self._admit = admit
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions = Shares(_ALL_PENDING_MAX, _PENDING_MAX)
        self._streams = Shares(_ALL_STREAMS_MAX, _STREAMS_MAX)
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def start(self, udp: socket.socket, tcp: socket.socket) -> None:
        """Answer on two sockets, which are bound and listen; they are closed with the resolver."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=udp)
        self._server = await asyncio.start_server(self._serve_stream, sock=tcp)

    async def close(self) -> None:
        """Stop answering."""
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one datagram."""
        box = self._boxes.get(IPv4Address(addr[0]))
        # The answer to what is beyond its share is lost. A task for it would not be bounded.
        if box is not None and self._take_question(box):
            self._begin(self._answer_datagram(box, data, addr))

    def _take_question(self, box: BoxState) -> bool:
        taken = self._questions.take(box.pending)
        box.pending += taken
        return taken

    def _give_question_back(self, box: BoxState) -> None:
        box.pending -= 1
        self._questions.give_back()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_datagram(self, box: BoxState, data: bytes, addr: tuple[str, int]) -> None:
        try:
            reply = await self.answer(box, data, udp=True)
        finally:
            self._give_question_back(box)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply, addr)

    async def _serve_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        box = self._boxes.get(IPv4Address(writer.get_extra_info("peername")[0]))
        if box is None or not self._streams.take(box.streams):
            writer.transport.abort()  # with what it has sent: nothing of it is kept
            return
        box.streams += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                async with asyncio.timeout(_STREAM_IDLE_S):
                    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                    data = await reader.readexactly(length)
                if not self._take_question(box):
                    return
                try:
                    reply = await self.answer(box, data, udp=False)
                finally:
                    self._give_question_back(box)
                if reply is None:
                    return
                writer.write(_LENGTH.pack(len(reply)) + reply)
                async with asyncio.timeout(_STREAM_IDLE_S):
                    await writer.drain()
        except (OSError, EOFError, TimeoutError):
            return
        finally:
            self._tasks.discard(task)
            box.streams -= 1
            self._streams.give_back()
            writer.close()

    async def answer(self, box: BoxState, wire: bytes, *, udp: bool) -> bytes | None:
        """Return the answer to what a box has sent; None where that is not a question."""
        box.questions += 1
        question = read_question(wire)
        if question is None:
            return None
        if isinstance(question, dns.message.Message):
            return to_wire(question, question, udp=udp)
        response = await self._decide(box, question)
        return to_wire(response, question.message, udp=udp)

    async def _decide(self, box: BoxState, question: Question) -> dns.message.Message:
        if not box.rules.is_allowed(question.name):
            return self._refuse(box, question, _NOT_ALLOWED)
        if question.is_empty:
            return answer(question.message)
        response = await self._upstream.ask(question.name, question.kind)
        if response is None:
            box.denials.add(question.name, _NO_ANSWER)
            return answer(question.message, dns.rcode.SERVFAIL)
        if not box.rules.is_allowed(question.name):  # any more
            return self._refuse(box, question, _NOT_ALLOWED)
        if question.kind != dns.rdatatype.A:
            return answer(question.message, response.rcode(), tuple(response.answer))
        chain = follow(question, response)
        if any(box.rules.is_denied(name) for name in chain.names):
            return self._refuse(box, question, _NOT_ALLOWED)
        return await self._open(box, question, response.rcode(), chain)

    async def _open(
        self, box: BoxState, question: Question, rcode: dns.rcode.Rcode, chain: Chain
    ) -> dns.message.Message:
        if not all(box.rules.may_answer(a, self._never) for a in chain.addresses):
            return self._refuse(box, question, _PRIVATE)
        if chain.addresses and not await self._admit(
            box, question.name, chain.addresses, chain.ttl_s
        ):
            return self._refuse(box, question, _FULL)
        return answer(question.message, rcode, chain.records)

    def _refuse(self, box: BoxState, question: Question, reason: str) -> dns.message.Message:
        box.refused += 1
        box.denials.add(question.name, reason)
        return refusal(question, reason)

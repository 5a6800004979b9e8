"""Answers to questions for names, as messages: no I/O."""

from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import cast

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.rdtypes.IN.A
import dns.rrset

__all__ = ["Chain", "Question", "answer", "follow", "read_question", "refusal", "to_wire"]

TTL_MAX_S = 3600
"""So that a box's knowledge of a name ends not long after that of its filter."""
_CNAMES_MAX = 16
_UDP_BYTES = 1232
_EMPTY = frozenset({dns.rdatatype.AAAA, dns.rdatatype.HTTPS, dns.rdatatype.SVCB})


@dataclass(frozen=True)
class Question:
    """A question that can be answered.

    Attributes:
        message: As it came.
        name: What it asks for, in lower case, without a dot at its end.
        kind: Type of the records.
    """

    message: dns.message.Message
    name: str
    kind: dns.rdatatype.RdataType

    @property
    def is_empty(self) -> bool:
        """Whether the answer has no records in any case: boxes have no IPv6, and no other ways round."""
        return self.kind in _EMPTY


@dataclass(frozen=True)
class Chain:
    """Where a name leads.

    Attributes:
        names: Its aliases, in order, without itself.
        records: Of the chain, aliases and addresses.
        addresses: At its end.
        ttl_s: The shortest of its times, in seconds.
    """

    names: tuple[str, ...]
    records: tuple[dns.rrset.RRset, ...]
    addresses: tuple[IPv4Address, ...]
    ttl_s: int


def read_question(wire: bytes) -> Question | dns.message.Message | None:
    """Return a question, or the answer to one that is not for us, or None: not a question at all."""
    try:
        message = dns.message.from_wire(wire)
    except (dns.exception.DNSException, ValueError):
        return None
    if message.flags & dns.flags.QR:
        return None
    if message.opcode() != dns.opcode.QUERY or len(message.question) != 1:
        return answer(message, dns.rcode.NOTIMP)
    asked = message.question[0]
    if asked.rdclass != dns.rdataclass.IN or asked.rdtype == dns.rdatatype.ANY:
        return answer(message, dns.rcode.NOTIMP)
    if any(b"." in label for label in asked.name.labels):
        # As text, which is what policies are about, it looks like a name below another one.
        return answer(message, dns.rcode.REFUSED)
    return Question(message, _text(asked.name), asked.rdtype)


def answer(
    question: dns.message.Message,
    rcode: dns.rcode.Rcode = dns.rcode.NOERROR,
    records: tuple[dns.rrset.RRset, ...] = (),
) -> dns.message.Message:
    """Return an answer with these records, their times cut to what the filter keeps."""
    response = dns.message.make_response(question, recursion_available=True, our_payload=_UDP_BYTES)
    response.set_rcode(rcode)
    for record in records:
        copy = cast(dns.rrset.RRset, record.copy())
        copy.ttl = min(copy.ttl, TTL_MAX_S)
        response.answer.append(copy)
    return response


def refusal(question: Question, reason: str) -> dns.message.Message:
    """Return the answer to a question that the policy does not allow, with the reason in words."""
    response = answer(question.message, dns.rcode.REFUSED)
    if question.message.edns >= 0:
        option = dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, reason)
        response.use_edns(0, payload=_UDP_BYTES, options=[option])
    return response


def follow(question: Question, response: dns.message.Message) -> Chain:
    """Follow the aliases in a response from the name asked for; what lies beside them is left out."""
    at = response.question[0].name if response.question else dns.name.from_text(question.name)
    names: list[str] = []
    records: list[dns.rrset.RRset] = []
    addresses: list[IPv4Address] = []
    for _ in range(_CNAMES_MAX):
        found = {
            rrset.rdtype: rrset
            for rrset in response.answer
            if rrset.name == at and rrset.rdclass == dns.rdataclass.IN
        }
        if dns.rdatatype.A in found:
            records.append(found[dns.rdatatype.A])
            addresses += [
                IPv4Address(item.address)
                for item in found[dns.rdatatype.A]
                if isinstance(item, dns.rdtypes.IN.A.A)
            ]
            break
        if dns.rdatatype.CNAME not in found:
            break
        records.append(found[dns.rdatatype.CNAME])
        alias = found[dns.rdatatype.CNAME][0]
        assert isinstance(alias, dns.rdtypes.ANY.CNAME.CNAME)
        at = alias.target
        names.append(_text(at))
    ttl = min((record.ttl for record in records), default=0)
    return Chain(tuple(names), tuple(records), tuple(addresses), min(ttl, TTL_MAX_S))


def to_wire(response: dns.message.Message, question: dns.message.Message, *, udp: bool) -> bytes:
    """Return a response as bytes; over UDP it is cut to what the asker can take."""
    limit = 65535
    if udp:
        limit = min(max(question.payload, 512), _UDP_BYTES) if question.edns >= 0 else 512
    return response.to_wire(max_size=limit, prefer_truncation=True)


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower()

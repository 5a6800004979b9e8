"""Questions of boxes are hostile bytes: whatever they are, there is an answer or none."""

import dns.message
import dns.name
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.node.network.answers import answer, follow, read_question, refusal, to_wire

NAMES = ("a.test", "x.y.example.org", r"\000\255.\"quoted\".test", "1.0.0.127.in-addr.arpa")
QUESTIONS = [
    dns.message.make_query(dns.name.from_text(name), kind, use_edns=edns).to_wire()
    for name in NAMES
    for kind in ("A", "TXT", "PTR")
    for edns in (True, False)
]
CHANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255), st.booleans()), max_size=6)


@given(st.sampled_from(QUESTIONS), CHANGES, st.integers(1, 200))
def test_damaged_questions(wire, changes, length):
    damaged = bytearray(wire)
    for position, value, insert in changes:
        if insert:
            damaged.insert(position % len(damaged), value)
        else:
            damaged[position % len(damaged)] = value
    question = read_question(bytes(damaged[:length]))
    if question is None:
        return
    if isinstance(question, dns.message.Message):
        assert len(to_wire(question, question, udp=True)) <= 1232
        return
    for response in (refusal(question, "no"), answer(question.message)):
        assert len(to_wire(response, question.message, udp=True)) <= 1232
    asked = dns.message.make_query(dns.name.from_text(question.name), question.kind)
    assert follow(question, dns.message.make_response(asked)).addresses == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_asked_for_as_it_came(name):
    """What is allowed by its text is the name that is then asked for."""
    wire = dns.message.make_query(dns.name.from_text(name), "A").to_wire()
    question = read_question(wire)
    assert dns.name.from_text(question.name) == question.message.question[0].name


def test_dots_within_a_label_are_not_dots():
    name = dns.name.Name((b"x.github", b"com", b""))
    assert name.to_text() == r"x\.github.com."
    question = read_question(dns.message.make_query(name, "A").to_wire())
    assert question.rcode() == dns.rcode.REFUSED


def test_aliases_in_a_circle_end():
    text = "id 1\nopcode QUERY\nrcode NOERROR\nflags QR\n;QUESTION\na.test. IN A\n;ANSWER\n"
    circle = "a.test. 5 IN CNAME b.test.\nb.test. 5 IN CNAME a.test.\n"
    question = read_question(dns.message.make_query("a.test.", "A").to_wire())
    chain = follow(question, dns.message.from_text(text + circle))
    assert chain.addresses == ()
    assert len(chain.names) == 16
    beside = "a.test. 5 IN CNAME b.test.\nc.test. 5 IN A 203.0.113.9\n"
    assert follow(question, dns.message.from_text(text + beside)).addresses == ()
    assert to_wire(
        answer(question.message, dns.rcode.NOERROR, chain.records), question.message, udp=True
    )

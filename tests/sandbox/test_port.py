"""Bytes through the port of a virtual machine: connections that nobody sees begin or end."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hadal.node.wire import PortReader, port_bytes

special = st.lists(st.sampled_from([b"\x7e", b"\x7d", b"\x5e", b"\x5d", b"x", b"\x00"])).map(
    b"".join
)
messages = st.lists(special | st.binary(max_size=40), max_size=5)


def in_parts(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def connections(reader, parts):
    """What each connection received, the one that went on before first."""
    found = [b""]
    for part in parts:
        first, *begun = reader.read(part)
        found[-1] += first
        found += begun
    return found


@given(messages, st.lists(st.integers(0, 1000), max_size=8))
def test_any_bytes_arrive_in_any_parts(sent, cuts):
    line = b"".join(port_bytes(data, begins=not at) for at, data in enumerate([b"", *sent]))
    assert connections(PortReader(), in_parts(line, cuts)) == [b"", b"".join(sent)]


@given(messages, st.integers(0, 1000), messages, st.lists(st.integers(0, 1000), max_size=8))
def test_a_new_connection_is_whole_whatever_was_cut_off_before_it(before, cut, after, cuts):
    old = port_bytes(b"".join(before), begins=True)
    line = old[: cut % (len(old) + 1)] + port_bytes(b"".join(after), begins=True)
    assert connections(PortReader(), in_parts(line, cuts))[-1] == b"".join(after)


def test_what_is_before_the_first_beginning_belongs_to_nobody():
    reader = PortReader()
    assert reader.read(b"left \x7d") == [b""]
    assert reader.read(b"over") == [b""]
    assert reader.read(b"\x7e\x5eyes") == [b"", b"\x5eyes"]

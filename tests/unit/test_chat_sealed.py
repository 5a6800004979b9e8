"""Sealed reasoning opens to the same text, and only if not a character of it has changed."""

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.chat.sealed import is_sealed, seal, unseal
from hadal.errors import InvalidConversationError


@given(st.text() | st.just("\ud800 lone"))
def test_round_trip(text):
    sealed = seal(text)
    assert is_sealed(sealed)
    assert sealed.isascii()
    assert unseal(sealed, "x") == text


@given(st.text(min_size=1), st.data())
def test_every_change_is_noticed(text, data):
    sealed = seal(text)
    place = data.draw(st.integers(len("hadal1."), len(sealed.rstrip("=")) - 1))
    other = data.draw(st.sampled_from("ABab01-_"))
    changed = sealed[:place] + other + sealed[place + 1 :]
    if base64.urlsafe_b64decode(changed[7:]) == base64.urlsafe_b64decode(sealed[7:]):
        return  # bits that base64 does not use
    with pytest.raises(InvalidConversationError, match="damaged"):
        unseal(changed, "x")


@pytest.mark.parametrize("value", ["hadal1.", "hadal1.AAAA", "hadal1.\u00e9", "hadal1.===="])
def test_rubbish(value):
    with pytest.raises(InvalidConversationError, match="damaged"):
        unseal(value, "x")


def test_a_bomb_is_refused():
    """Eight kilobytes that would unpack to more than is allowed."""
    from hadal.chat import sealed

    packed = zlib.compress(b"a" * (65 << 20), 9)
    bomb = "hadal1." + base64.urlsafe_b64encode(sealed._digest(packed) + packed).decode()
    with pytest.raises(InvalidConversationError, match="damaged"):
        unseal(bomb, "x")


@pytest.mark.parametrize("value", [None, "", "xyz", "hadal2.AAAA"])
def test_of_other_servers(value):
    assert not is_sealed(value)

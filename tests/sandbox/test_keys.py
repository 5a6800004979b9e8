"""Keys of a machine's keyboard."""

import string

import pytest

from hadal.errors import ConfigError
from hadal.node.machines.keys import chord, strokes


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a", ("a",)),
        ("Q", ("shift", "q")),
        ("Enter", ("ret",)),
        ("Control+Alt+F2", ("ctrl", "alt", "f2")),
        ("Shift+A", ("shift", "a")),
        ("+", ("shift", "equal")),
        ("Control++", ("ctrl", "shift", "equal")),
        ("Control+-", ("ctrl", "minus")),
    ],
)
def test_a_chord(text, keys):
    assert chord(text) == keys


@pytest.mark.parametrize(
    "text", ["", "Control+", "+Control", "Ctrl", "enter", "F13", "é", "Control+Enter+no"]
)
def test_what_is_no_key(text):
    with pytest.raises(ConfigError, match="no key"):
        chord(text)


def test_every_printable_character_has_keys_of_its_own():
    characters = string.printable.replace("\r", "").replace("\x0b", "").replace("\x0c", "")
    assert len(set(strokes(characters))) == len(characters)


def test_a_character_without_a_key():
    with pytest.raises(ConfigError, match="no key for 'é'"):
        list(strokes("caf\u00e9"))

"""Keys of a machine's keyboard: what people call them, and what QEMU does (its `QKeyCode`); US layout."""

from collections.abc import Iterator

from hadal.errors import ConfigError

__all__ = ["chord", "strokes"]

_NAMED = {
    "Control": "ctrl", "Shift": "shift", "Alt": "alt", "AltGraph": "alt_r", "Meta": "meta_l",
    "Enter": "ret", "Tab": "tab", "Escape": "esc", "Backspace": "backspace", "Delete": "delete", "Insert": "insert",
    "Home": "home", "End": "end", "PageUp": "pgup", "PageDown": "pgdn",
    "ArrowLeft": "left", "ArrowRight": "right", "ArrowUp": "up", "ArrowDown": "down",
    "CapsLock": "caps_lock", "PrintScreen": "print", "ContextMenu": "menu",
} | {f"F{number}": f"f{number}" for number in range(1, 13)}  # fmt: skip
"""The names that browsers use (UI Events KeyboardEvent key values)."""

_PLAIN = {
    " ": "spc", "\n": "ret", "\t": "tab", "-": "minus", "=": "equal", "[": "bracket_left", "]": "bracket_right",
    "\\": "backslash", ";": "semicolon", "'": "apostrophe", "`": "grave_accent", ",": "comma", ".": "dot", "/": "slash",
} | {letter: letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"}  # fmt: skip
_SHIFTED = dict(zip('~!@#$%^&*()_+{}|:"<>?', "`1234567890-=[]\\;',./", strict=True))


def _of_character(character: str) -> tuple[str, ...] | None:
    if character in _PLAIN:
        return (_PLAIN[character],)
    below = _SHIFTED.get(character, character.lower() if character.isascii() else "")
    return ("shift", _PLAIN[below]) if below in _PLAIN else None


def chord(text: str) -> tuple[str, ...]:
    """Return the keys of a name such as "Control+Alt+F2", "Enter" or "a", in the order in which they go down.

    Raises:
        ConfigError: There is no such key.
    """
    names = [*text[:-2].split("+"), "+"] if text.endswith("++") else text.split("+")
    if text == "+":
        names = ["+"]
    found: list[str] = []
    for name in names:
        keys = (_NAMED[name],) if name in _NAMED else _of_character(name)
        if keys is None:
            raise ConfigError(
                f"no key {name!r:.40} in {text!r:.100}",
                hint=f"one character of a US keyboard, or one of {', '.join(sorted(_NAMED))}; joined by +",
            )
        found += [key for key in keys if key not in found]
    return tuple(found)


def strokes(text: str) -> Iterator[tuple[str, ...]]:
    """Yield the keys of each character of a text.

    Raises:
        ConfigError: A US keyboard has no key for one of them.
    """
    for character in text:
        keys = _of_character(character)
        if keys is None:
            raise ConfigError(
                f"a US keyboard has no key for {character!r}",
                hint="write it into a file of the box",
            )
        yield keys

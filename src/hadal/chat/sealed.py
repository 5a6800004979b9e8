"""Reasoning in the opaque fields that two APIs have for it.

Clients of the Responses API that store nothing send `encrypted_content` back, those of the Messages API
a thinking block's `signature`; some of them send nothing else. So both carry the text itself, packed,
with a checksum. It is sealed against damage, not against forgery: a client may send any reasoning as
plain text anyway, and needing no key it opens on every server and after every restart.
"""

import base64
import binascii
import zlib
from hashlib import blake2b
from typing import Final

from hadal.errors import InvalidConversationError

__all__ = ["is_sealed", "seal", "unseal"]

_PREFIX: Final = "hadal1."
_DIGEST_BYTES: Final = 8
_MAX_BYTES: Final = 64 << 20
"""Of the text: a packed one of a few bytes could say that it is any size."""


def seal(reasoning: str) -> str:
    """Return the opaque form of a text."""
    data = reasoning.encode("utf-8", errors="surrogatepass")
    packed = zlib.compress(data)
    return _PREFIX + base64.urlsafe_b64encode(_digest(packed) + packed).decode()


def is_sealed(value: str | None) -> bool:
    """Return whether a value claims to be of this form; others come from other servers."""
    return value is not None and value.startswith(_PREFIX)


def unseal(value: str, where: str) -> str:
    """Return the text of an opaque form.

    Args:
        value: For which `is_sealed` holds.
        where: Its place in the request, for the error.

    Raises:
        InvalidConversationError: It is damaged.
    """
    try:
        data = base64.b64decode(value.removeprefix(_PREFIX), altchars=b"-_", validate=True)
        digest, packed = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest == _digest(packed):
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(packed, _MAX_BYTES)
            if unpacker.eof and not unpacker.unused_data:
                return text.decode("utf-8", errors="surrogatepass")
    except (binascii.Error, ValueError, zlib.error):
        pass  # as damaged as a wrong digest
    raise InvalidConversationError(
        "this sealed reasoning is damaged",
        where=where,
        hint="send it back as it came, or not at all",
    )


def _digest(packed: bytes) -> bytes:
    return blake2b(packed, digest_size=_DIGEST_BYTES).digest()

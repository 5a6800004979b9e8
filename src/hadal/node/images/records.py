"""What the store keeps about an image: its layers, what is bound into it, and how commands start in it.

Layers stand in the order in which overlayfs takes them, the top one first, everywhere in this package
but in what OCI defines (hadal.node.images.oci). docs/formats/image-store.md specifies the files.
"""

import hashlib
import json
import re
from typing import Annotated, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from hadal.errors import ImageError

__all__ = [
    "DIGEST",
    "LAYERS_MAX",
    "Bind",
    "ImageConfig",
    "ImageRecord",
    "LayerReference",
    "check_name",
    "file_name",
    "is_digest",
]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LAYERS_MAX = 127
"""Of one image: what a box can stack."""
_NAME_BYTES_MAX = 240

NoNul = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00=]+$")]
LayerReference = Annotated[
    str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64}|/[^\x00]*)$", max_length=4096)
]
"""A layer of the store by its digest, or a directory of the host that is used in place."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageConfig(_Frozen):
    """How commands start in an image.

    Attributes:
        environment: Variables.
        working_directory: Where they start.
        user: As `CommandOrder.user`.
        entrypoint: Put before every command; None of ours does by itself.
        command: What runs where nothing else is asked for.
    """

    environment: dict[Name, NoNul] = {}
    working_directory: NoNul = "/"
    user: NoNul = "0"
    entrypoint: tuple[NoNul, ...] = ()
    command: tuple[NoNul, ...] = ()


class Bind(_Frozen):
    """A directory of the host that boxes of an image see, read only.

    Attributes:
        source: On the host.
        target: In the box.
    """

    source: NoNul
    target: NoNul


class ImageRecord(_Frozen):
    """One image.

    Attributes:
        version: Of this format.
        name: Unique in the store; the digest where it was given no other.
        digest: Of layers, binds and config: equal images have equal ones.
        layers: The top one first.
        binds: Directories of the host it needs besides.
        config: How commands start.
        origin: Where it came from, for people: a reference with its digest, a path; or "".
    """

    version: Literal[1] = 1
    name: str
    digest: str
    layers: Annotated[tuple[LayerReference, ...], Field(min_length=1, max_length=LAYERS_MAX)]
    binds: tuple[Bind, ...] = ()
    config: ImageConfig = ImageConfig()
    origin: str = ""

    @classmethod
    def make(
        cls,
        name: str | None,
        layers: tuple[str, ...],
        *,
        config: ImageConfig,
        binds: tuple[Bind, ...] = (),
        origin: str = "",
    ) -> Self:
        """Return the record of an image, named by its digest where it has no name.

        Raises:
            ImageError: It has no layer, or more than a box can stack.
        """
        if not 1 <= len(layers) <= LAYERS_MAX:
            raise ImageError(
                f"an image of {len(layers)} layers: expected 1 to {LAYERS_MAX}",
                hint="import the whole tree as one layer: hadal image import DIRECTORY",
            )
        content = {
            "layers": layers,
            "binds": [bind.model_dump() for bind in binds],
            "config": config.model_dump(),
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        digest = f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
        return cls(
            name=name or digest,
            digest=digest,
            layers=layers,
            binds=binds,
            config=config,
            origin=origin,
        )


def is_digest(text: str) -> bool:
    """Return whether a text is a digest as this package writes them."""
    return DIGEST.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Return a name that a caller gives to an image.

    Raises:
        ImageError: It cannot be one.
    """
    odd = not name.isprintable() or name.strip() != name or name[:1] in ("", "/", ".", "~")
    if odd or name == "host" or name.startswith("sha256:"):
        raise ImageError(
            f"cannot name an image {name!r:.200}",
            hint="a name begins with a letter or digit, and is neither `host` nor a digest",
        )
    file_name(name)
    return name


def file_name(name: str) -> str:
    """Return the name of the file of an image's record.

    Raises:
        ImageError: It is too long.
    """
    quoted = quote(name, safe="", errors="surrogateescape")
    if len(quoted) > _NAME_BYTES_MAX:
        raise ImageError(
            f"a name of {len(quoted)} bytes as a file name; expected at most {_NAME_BYTES_MAX}"
        )
    return f"{quoted}.json"

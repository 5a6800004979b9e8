"""What registries, layouts and archives say about images, as far as it is read here.

Nothing in it is believed before it is checked. Layers stand the bottom one first, as OCI has it.
"""

import json
import platform
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hadal.errors import ImageError
from hadal.node.images.records import LAYERS_MAX, ImageConfig

__all__ = [
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "METADATA_BYTES_MAX",
    "ArchivedImage",
    "Descriptor",
    "Index",
    "Manifest",
    "OCIConfig",
    "choose",
    "machine",
    "parse",
    "read_config",
    "read_manifest",
]

METADATA_BYTES_MAX = 8 << 20
"""Of a manifest, an index or a config."""
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")

_Model = TypeVar("_Model", bound=BaseModel)
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Foreign(BaseModel):
    # The formats may be extended: what is not known here is left alone.
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Platform(_Foreign):
    """What machine an image is for."""

    architecture: str = ""
    os: str = ""
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(_Foreign):
    """A blob: what it is, its digest and its bytes."""

    media_type: str = Field("", alias="mediaType")
    digest: Digest
    size: Annotated[int, Field(ge=0, le=1 << 50)]
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What an index calls it."""
        notes = self.annotations or {}
        return tuple(notes[key] for key in NAME_ANNOTATIONS if key in notes)


class Index(_Foreign):
    """Images of one name, one for each platform."""

    manifests: Annotated[tuple[Descriptor, ...], Field(max_length=1000)]


class Manifest(_Foreign):
    """One image: its config and layers."""

    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], Field(min_length=1, max_length=LAYERS_MAX)]


class _RootFS(_Foreign):
    diff_ids: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=LAYERS_MAX)]


class _Process(_Foreign):
    env: tuple[str, ...] | None = Field(None, alias="Env")
    working_directory: str | None = Field(None, alias="WorkingDir")
    user: str | None = Field(None, alias="User")
    entrypoint: tuple[str, ...] | None = Field(None, alias="Entrypoint")
    command: tuple[str, ...] | None = Field(None, alias="Cmd")


class OCIConfig(_Foreign):
    """How commands start in an image, and the digests of its layers after decompression."""

    architecture: str = ""
    os: str = ""
    rootfs: _RootFS
    config: _Process | None = None


class ArchivedImage(_Foreign):
    """An image in `manifest.json` of what `docker save` writes."""

    config: str = Field(alias="Config")
    names: tuple[str, ...] | None = Field(None, alias="RepoTags")
    layers: Annotated[tuple[str, ...], Field(min_length=1, max_length=LAYERS_MAX, alias="Layers")]


class _Kind(_Foreign):
    media_type: str = Field("", alias="mediaType")
    version: Literal[2] = Field(2, alias="schemaVersion")
    manifests: object = None


def parse(model: type[_Model], data: bytes, what: str) -> _Model:
    """Read JSON of others.

    Raises:
        ImageError: It is none, or not of this shape.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ImageError(f"{what} is not what it should be: {where}: {first['msg']}") from error


def read_manifest(data: bytes, what: str) -> Index | Manifest:
    """Read a manifest, of one image or of one for each platform.

    Raises:
        ImageError: It is neither, or of the first version.
    """
    kind = parse(_Kind, data, what)
    if kind.media_type in INDEX_TYPES or kind.manifests is not None:
        return parse(Index, data, what)
    return parse(Manifest, data, what)


def machine() -> str:
    """Return this machine as OCI names it."""
    return _MACHINES.get(platform.machine(), platform.machine())


def choose(index: Index, what: str) -> Descriptor:
    """Return the manifest for this machine.

    Raises:
        ImageError: There is none; the message lists the others.
    """
    wanted = [
        found
        for found in index.manifests
        if found.platform is None
        or (found.platform.os, found.platform.architecture) == ("linux", machine())
    ]
    if not wanted:
        there = ", ".join(str(found.platform) for found in index.manifests[:20]) or "nothing"
        raise ImageError(f"{what} has no image for linux/{machine()}; it has {there}")
    return wanted[0]


def read_config(config: OCIConfig, what: str) -> ImageConfig:
    """Return how commands start.

    Raises:
        ImageError: It holds what no process can be started with.
    """
    given = config.config or _Process.model_validate({})
    pairs = (item.partition("=") for item in given.env or ())
    content = {
        "environment": {name: value for name, sign, value in pairs if name and sign},
        "working_directory": given.working_directory or "/",
        "user": given.user or "0",
        "entrypoint": given.entrypoint or (),
        "command": given.command or (),
    }
    return parse(ImageConfig, json.dumps(content).encode(), f"the config of {what}")

"""Names of images in registries: `[HOST/]REPOSITORY[:TAG][@DIGEST]`."""

import re
from dataclasses import dataclass

from hadal.errors import ImageError

__all__ = ["DEFAULT_REGISTRY", "Reference"]

DEFAULT_REGISTRY = "docker.io"
_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_REGISTRY = re.compile(r"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LENGTH_MAX = 500


@dataclass(frozen=True)
class Reference:
    """One image in one registry.

    Attributes:
        registry: Host, with its port.
        repository: Path.
        tag: Or None where only the digest counts.
        digest: Of the manifest, or None.
    """

    registry: str
    repository: str
    tag: str | None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read a reference; `debian` is short for `docker.io/library/debian:latest`.

        Raises:
            ImageError: It is none.
        """
        rest, at, digest = text.partition("@")
        first, slash, path = rest.partition("/")
        registry = DEFAULT_REGISTRY
        if slash and ("." in first or ":" in first or first == "localhost"):
            registry, rest = first, path
        repository, colon, tag = rest.partition(":")
        if registry == DEFAULT_REGISTRY and "/" not in repository:
            repository = f"library/{repository}"
        wrong = (
            len(text) > _LENGTH_MAX
            or not _REGISTRY.fullmatch(registry)
            or not _REPOSITORY.fullmatch(repository)
            or (colon and not _TAG.fullmatch(tag))
            or (at and not _DIGEST.fullmatch(digest))
        )
        if wrong:
            raise ImageError(
                f"not the name of an image: {text!r:.200}",
                hint="a reference is like debian:12 or registry.example/owner/name:tag",
            )
        return cls(registry, repository, tag or (None if digest else "latest"), digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

"""An image that is ready for boxes to start from."""

from dataclasses import dataclass
from pathlib import Path

from hadal.node.images.records import Bind, ImageConfig

__all__ = ["ResolvedImage"]


@dataclass(frozen=True, kw_only=True)
class ResolvedImage:
    """An image in use: its layers stay where they are until `ImageStore.release`.

    Attributes:
        name: What was asked for, in full.
        digest: Of the image; None for a directory that is used in place.
        layers: Directories, the top one first, as `LaunchRequest.layers` takes them.
        references: Digest of each layer, or path where it is no layer of the store.
        binds: Host directory, path in the box, and that it is read-only, as `LaunchRequest.binds`.
        config: How commands start.
    """

    name: str
    digest: str | None
    layers: tuple[Path, ...]
    references: tuple[str, ...]
    binds: tuple[tuple[Path, str, bool], ...]
    config: ImageConfig

    @property
    def recorded_binds(self) -> tuple[Bind, ...]:
        """The binds as a record has them."""
        return tuple(Bind(source=str(s), target=t) for s, t, _ in self.binds)

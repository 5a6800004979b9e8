"""Roots of boxes from the image store: what `Node` asks for, in the store's words."""

from hadal.node.box import ImageDefaults
from hadal.node.images import ImageStore, ResolvedImage
from hadal.node.node import Root

__all__ = ["StoreImages"]


class StoreImages:
    """The images of a node, held for its boxes.

    Args:
        store: Where they are.
    """

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        self._held: dict[str, list[ResolvedImage]] = {}

    async def acquire(self, reference: str, holder: str) -> Root:
        """Return the root of an image, and keep it until its holder is released.

        Raises:
            ImageError: It cannot be had or mounted.
        """
        image = await self.store.acquire(reference)
        self._held.setdefault(holder, []).append(image)
        config = image.config
        return Root(
            layers=image.layers,
            binds=tuple((source, target) for source, target, _ in image.binds),
            defaults=ImageDefaults(
                env=config.environment, working_dir=config.working_directory, user=config.user
            ),
        )

    def held(self, holder: str) -> tuple[ResolvedImage, ...]:
        """Return what a holder has, in the order in which it came: what a snapshot is made on top of."""
        return tuple(self._held.get(holder, ()))

    async def release(self, holder: str) -> None:
        """Let go of what this holder has acquired; nothing is fine too.

        Raises:
            ImageError: A mount cannot be taken away.
        """
        for image in self._held.pop(holder, ()):
            await self.store.release(image)

"""Recipes carried out: each step makes a layer, and is not done again while nothing before it changes."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.images.catalog import Catalog
from hadal.node.images.copies import place_copy
from hadal.node.images.ingest import run_in_thread
from hadal.node.images.layers import Hold, Layers
from hadal.node.images.mounts import Mounts
from hadal.node.images.recipes import Recipe, Step
from hadal.node.images.records import ImageConfig
from hadal.node.images.resolved import ResolvedImage
from hadal.node.images.unpack import Stopped

__all__ = ["Builder", "Runner"]

Runner = Callable[[ResolvedImage, str], Awaitable[Path]]
"""Runs a command for `/bin/sh -c` in a box of an image; returns the upper directory of its overlay.

It raises where the command fails, and removes the directory when it is told the next command or later.
"""


class Builder:
    """One build.

    Args:
        layers, catalog, mounts: Of the store.
        run: Makes boxes.
        bytes_max: Content of one layer.
        on_step: Told each step, and whether its layer was known.
    """

    def __init__(
        self,
        layers: Layers,
        catalog: Catalog,
        mounts: Mounts,
        run: Runner,
        *,
        bytes_max: int | None,
        on_step: Callable[[Step, bool], None] | None = None,
    ) -> None:
        self._layers = layers
        self._catalog = catalog
        self._mounts = mounts
        self._run = run
        self._bytes_max = bytes_max
        self._on_step = on_step or _tell_nobody

    async def build(self, recipe: Recipe, image: ResolvedImage, held: ExitStack) -> ResolvedImage:
        """Return the image that a recipe makes of its base; its new layers are held.

        Raises:
            ImageError: A step cannot be done.
        """
        for step in recipe.steps:
            if (settings := step.settings) is not None:
                environment = image.config.environment | (step.environment or {})
                changed = image.config.model_dump() | settings | {"environment": environment}
                image = replace(image, config=ImageConfig.model_validate(changed))
                self._on_step(step, True)
            else:
                image = await self._add_layer(recipe, step, image, held)
        return image

    async def _add_layer(
        self, recipe: Recipe, step: Step, image: ResolvedImage, held: ExitStack
    ) -> ResolvedImage:
        if step.run is not None:
            digest, hold = await self._run_step(step, step.run, image)
        else:
            digest, hold = await run_in_thread(
                lambda _: self._copy_step(recipe, step, image), undo=_let_go
            )
            self._on_step(step, False)
        try:
            path = self._mounts.acquire(digest)
        finally:
            hold.close()
        held.callback(self._mounts.release, digest)
        layers, references = (path, *image.layers), (digest, *image.references)
        return replace(image, layers=layers, references=references)

    async def _run_step(self, step: Step, command: str, image: ResolvedImage) -> tuple[str, Hold]:
        key = _key(command, image)
        known = self._catalog.find_step(key)
        hold = None if known is None else self._layers.find(known)
        self._on_step(step, hold is not None)
        if known is not None and hold is not None:
            return known, hold
        upper = await self._run(image, command)

        def add(stopped: Stopped) -> tuple[str, Hold]:
            digest, hold = self._layers.add_directory(upper, upper=True, bytes_max=self._bytes_max)
            self._catalog.save_step(key, digest)
            return digest, hold

        return await run_in_thread(add, undo=_let_go)

    def _copy_step(self, recipe: Recipe, step: Step, image: ResolvedImage) -> tuple[str, Hold]:
        assert step.copy_from is not None
        assert step.to is not None
        directory = recipe.directory.resolve()
        source = (directory / step.copy_from).resolve()
        if not source.is_relative_to(directory):
            raise ImageError(f"cannot copy {step.copy_from!r:.200}: it is not below {directory}")
        for _, bound, _ in image.binds:
            if Path(step.to).is_relative_to(bound):
                raise ImageError(f"cannot copy to {step.to}: {bound} is that of the host")
        with self._layers.stage() as folder:
            made = folder / "copy"
            place_copy(source, step.to, made, below=image.layers, bytes_max=self._bytes_max)
            return self._layers.add_directory(made)


def _let_go(made: tuple[str, Hold]) -> None:
    made[1].close()


def _tell_nobody(step: Step, known: bool) -> None:
    pass


def _key(command: str, image: ResolvedImage) -> str:
    """Return what a step's result depends on, as a digest: all that is below it, and the command."""
    depends = {
        "command": command,
        "layers": image.references,
        "binds": [str(source) for source, _, _ in image.binds],
        "config": image.config.model_dump(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

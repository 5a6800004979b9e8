"""Images from elsewhere into the store: every layer fetched, checked, unpacked and installed once.

A source (a registry, a layout, an archive) says which layers an image has and how to get at each; what is
done with them is the same.
"""

import asyncio
import functools
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hadal.errors import ImageError
from hadal.node.images.layers import Hold, Layers
from hadal.node.images.oci import OCIConfig, read_config
from hadal.node.images.records import ImageConfig
from hadal.node.images.unpack import Stopped, unpack

__all__ = [
    "Fetch",
    "FoundImage",
    "FoundLayer",
    "Progress",
    "ingest_layers",
    "run_in_thread",
    "staged",
]

Progress = Callable[[str, int, int], None]
"""Told the name of a part, how much of it is done, and how much there is in all, in bytes."""
Fetch = Callable[[Path, Callable[[int], None]], Awaitable[Path]]
"""Takes a folder for what it needs and a callback for bytes done; returns a checked, readable file."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class FoundLayer:
    """A layer that a source offers.

    Attributes:
        digest: After decompression.
        size: Bytes to fetch.
        fetch: Gets it.
    """

    digest: str
    size: int
    fetch: Fetch


@dataclass(frozen=True)
class FoundImage:
    """An image that a source offers.

    Attributes:
        layers: The top one first.
        config: How commands start in it.
        origin: For `ImageRecord.origin`.
    """

    layers: tuple[FoundLayer, ...]
    config: ImageConfig
    origin: str

    @classmethod
    def from_oci(
        cls,
        config: OCIConfig,
        sizes: Sequence[int],
        fetches: Sequence[Fetch],
        *,
        what: str,
        origin: str,
    ) -> "FoundImage":
        """Return an image as OCI describes it, the bottom layer first.

        Raises:
            ImageError: Its config does not fit its layers.
        """
        digests = config.rootfs.diff_ids
        if len(digests) != len(fetches):
            raise ImageError(
                f"{what}: a manifest of {len(fetches)} layers with a config of {len(digests)}"
            )
        layers = [FoundLayer(*layer) for layer in zip(digests, sizes, fetches, strict=True)]
        return cls(tuple(reversed(layers)), read_config(config, what), origin)


async def run_in_thread(
    work: Callable[[Stopped], _T], *, undo: Callable[[_T], object] | None = None
) -> _T:
    """Run blocking work; when the caller is cancelled, the work is stopped and waited for.

    So nothing goes on behind the back of a caller who cleans up.

    Args:
        work: Given a flag that asks it to stop.
        undo: Takes a result that nobody wants any more.
    """
    stopped = Stopped()
    task = asyncio.ensure_future(asyncio.to_thread(work, stopped))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stopped.set()
        while not task.done():
            with suppress(asyncio.CancelledError):  # once is enough
                await asyncio.wait([task])
        if undo is not None and not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise


@asynccontextmanager
async def staged(layers: Layers) -> AsyncGenerator[Path]:
    """`Layers.stage` for coroutines: what is left in it is removed by a thread.

    Raises:
        ImageError: The disk is full, or not ours to write; inside it too.
    """
    stage = layers.stage()
    folder = await run_in_thread(
        lambda _: stage.__enter__(), undo=lambda _: stage.__exit__(None, None, None)
    )
    try:
        yield folder
    except BaseException:
        failure = sys.exc_info()
        await run_in_thread(lambda _: stage.__exit__(*failure))
        raise
    await run_in_thread(lambda _: stage.__exit__(None, None, None))


async def ingest_layers(
    layers: Layers,
    found: Sequence[FoundLayer],
    holds: ExitStack,
    *,
    bytes_max: int,
    at_once: int,
    progress: Progress | None = None,
) -> None:
    """See that all layers are in the store, and hold them.

    Args:
        layers: Of the store.
        found: Those of an image.
        holds: Closes the holds; to be kept open until a record refers to the layers.
        bytes_max: Of one layer, before and after decompression.
        at_once: Layers that are worked on at a time.
        progress: Told about each layer.

    Raises:
        ImageError: One of them cannot be had; those that are whole stay in the store until it is pruned.
    """
    room = asyncio.Semaphore(at_once)
    report = progress or _tell_nobody

    async def get(layer: FoundLayer) -> None:
        async with room:
            hold = await run_in_thread(lambda _: layers.find(layer.digest), undo=_close)
            if hold is None:
                await _fetch_and_install(layers, layer, holds, bytes_max, report)
            else:
                holds.callback(hold.close)
            report(layer.digest, layer.size, layer.size)

    try:
        async with asyncio.TaskGroup() as group:
            for layer in {layer.digest: layer for layer in found}.values():
                group.create_task(get(layer))
    except ExceptionGroup as errors:
        ours = [error for error in errors.exceptions if isinstance(error, ImageError)]
        if not ours:
            raise
        raise ours[0] from errors


async def _fetch_and_install(
    layers: Layers, layer: FoundLayer, holds: ExitStack, bytes_max: int, progress: Progress
) -> None:
    if layer.size > bytes_max:
        raise ImageError(f"a layer of {layer.size:,} bytes; expected at most {bytes_max:,}")
    async with staged(layers) as folder:
        report = functools.partial(_report, progress, layer)
        archive = await layer.fetch(folder, report)

        def install(stopped: Stopped) -> Hold:
            tree = folder / "tree"
            tree.mkdir(mode=0o755)
            found = unpack(archive, tree, bytes_max=bytes_max, stopped=stopped)
            if found != layer.digest:
                raise ImageError(f"a layer unpacks to digest {found}, expected {layer.digest}")
            return layers.install(tree, layer.digest)

        hold = await run_in_thread(install, undo=_close)
        holds.callback(hold.close)  # before anything else is awaited


def _close(hold: Hold | None) -> None:
    if hold is not None:
        hold.close()


def _tell_nobody(part: str, done: int, total: int) -> None:
    pass


def _report(progress: Progress, layer: FoundLayer, done: int) -> None:
    progress(layer.digest, done, layer.size)

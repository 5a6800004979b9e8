"""The images of one machine. Start here; docs/formats/image-store.md says what is on disk.

Any number of processes may use one store at once. Whatever is killed, at any time, leaves nothing that
others see half-made; what it leaves otherwise, `prune` removes.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from hadal.errors import ImageError
from hadal.node.images.build import Builder, Runner
from hadal.node.images.catalog import Catalog
from hadal.node.images.failures import image_errors
from hadal.node.images.host import make_skeleton
from hadal.node.images.ingest import (
    FoundImage,
    Progress,
    ingest_layers,
    run_in_thread,
    staged,
)
from hadal.node.images.layers import Layers
from hadal.node.images.layouts import find_in_layout
from hadal.node.images.mounts import Mounts
from hadal.node.images.pull import find_in_registry
from hadal.node.images.recipes import Recipe, Step
from hadal.node.images.records import ImageConfig, ImageRecord, check_name, is_digest
from hadal.node.images.references import Reference
from hadal.node.images.registry import RegistrySettings, Repository
from hadal.node.images.resolved import ResolvedImage
from hadal.node.images.unpack import unpack
from hadal.sandbox.embedded import state_folder

__all__ = ["HOST", "ImageStore", "default_folder"]

HOST = "host"
"""The image that is this machine's own /usr."""
_T = TypeVar("_T")


def default_folder() -> Path:
    """Return where the embedded node keeps its images: in its state folder."""
    return state_folder() / "images"


class ImageStore:
    """Images in a folder.

    Args:
        root: The folder, made where it is missing; on a local file system.
        registry: How registries are reached.
        erofs: Keep layers as EROFS images; None: where they can be made and mounted.
        compress: Compress them: smaller, slower to read.
        shared: Folder on a mount that many machines see, for the content of EROFS layers; here is only
            their metadata then. What another machine has put there is not fetched again. What is
            made here while it cannot be written stays here.
        layer_bytes_max: Content of one layer that comes from outside or from a box.
        idle_mounts_max: Layers that stay mounted though nobody uses them.

    Raises:
        ImageError: The folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        *,
        registry: RegistrySettings | None = None,
        erofs: bool | None = None,
        compress: bool = False,
        shared: Path | None = None,
        layer_bytes_max: int = 64 << 30,
        idle_mounts_max: int = 64,
    ) -> None:
        self.root = root
        self._registry = registry or RegistrySettings()
        self._layers = Layers(root.absolute(), erofs=erofs, compress=compress, shared=shared)
        self._catalog = Catalog(self._layers)
        self._mounts = Mounts(self._layers, idle_max=idle_mounts_max)
        self._bytes_max = layer_bytes_max
        self._pulls: dict[str, asyncio.Lock] = {}
        self._host: ImageRecord | None = None

    async def pull(self, reference: str, progress: Progress | None = None) -> ImageRecord:
        """Get an image from its registry, or from a mirror of it.

        What is there already is not fetched again. On failure the store has what it had before, and
        layers that came through, which the next attempt finds.

        Args:
            reference: As `debian:12` or `registry.example:5000/team/tool@sha256:…`.
            progress: Told about each layer, from the event loop.

        Raises:
            ImageError: What could not be had, and why.
        """
        parsed = Reference.parse(reference)
        async with Repository.open_session(self._registry) as session:
            repository = Repository(session, self._registry, parsed)
            async with staged(self._layers) as folder:
                found = await find_in_registry(repository, folder)
            return await self._ingest(found, str(parsed), progress)

    async def import_archive(
        self,
        path: Path,
        *,
        name: str | None = None,
        select: str | None = None,
        progress: Progress | None = None,
    ) -> ImageRecord:
        """Import what `docker save` or `skopeo copy … oci-archive:` wrote; gzip or zstd around it is fine.

        Args:
            path: The file.
            name: In the store. Default: what the archive calls it.
            select: Its name in the archive, where that has several images.
            progress: Told about each layer.

        Raises:
            ImageError: It is no such archive, or damaged, or has no name.
        """
        async with staged(self._layers) as folder:
            content = folder / "content"
            content.mkdir()
            most = self._bytes_max * 2  # several layers are in it
            await run_in_thread(lambda stop: unpack(path, content, bytes_max=most, stopped=stop))
            return await self._import(content, str(path), name, select, progress)

    async def import_layout(
        self,
        path: Path,
        *,
        name: str | None = None,
        select: str | None = None,
        progress: Progress | None = None,
    ) -> ImageRecord:
        """Import an image of an OCI layout directory; arguments as for `import_archive`.

        Raises:
            ImageError: It is no layout, or damaged, or has no name.
        """
        return await self._import(path, str(path), name, select, progress)

    async def _import(
        self,
        path: Path,
        what: str,
        name: str | None,
        select: str | None,
        progress: Progress | None,
    ) -> ImageRecord:
        found, called = await asyncio.to_thread(find_in_layout, path, select=select, what=what)
        if name is not None:
            chosen = check_name(name)
        elif called is not None and {"/", ":"}.intersection(called):
            chosen = str(Reference.parse(called))
        else:  # some tools write the tag alone
            raise ImageError(f"{what} does not say what its image is called", hint="give a name")
        return await self._ingest(found, chosen, progress)

    async def _ingest(self, found: FoundImage, name: str, progress: Progress | None) -> ImageRecord:
        references = tuple(layer.digest for layer in found.layers)
        record = ImageRecord.make(name, references, config=found.config, origin=found.origin)
        with ExitStack() as holds:
            await ingest_layers(
                self._layers,
                found.layers,
                holds,
                bytes_max=self._bytes_max,
                at_once=self._registry.downloads,
                progress=progress,
            )
            await run_in_thread(lambda _: self._catalog.save(record))
        return record

    async def import_directory(
        self, path: Path, name: str, *, config: ImageConfig | None = None
    ) -> ImageRecord:
        """Import a root file system, as debootstrap makes it, as an image of one layer.

        Owners, modes, times, links, devices and extended attributes are kept; sockets are not.

        Raises:
            ImageError: It cannot be read, or the disk is full.
        """
        check_name(name)

        def add() -> ImageRecord:
            digest, hold = self._layers.add_directory(path)
            try:
                used = config or ImageConfig()
                record = ImageRecord.make(name, (digest,), config=used, origin=str(path))
                self._catalog.save(record)
            finally:
                hold.close()
            return record

        return await run_in_thread(lambda _: add())

    async def commit(
        self,
        upper: Path,
        base: ResolvedImage,
        *,
        config: ImageConfig | None = None,
        name: str | None = None,
    ) -> ImageRecord:
        """Make an image of what a box has changed.

        Args:
            upper: The upper directory of its overlay; ids in it are the box's own. The box may run on;
                then the layer has each file as it was when its turn came.
            base: What the box was made from; acquired.
            config: Of the new image. Default: that of the base.
            name: In the store. Default: its digest.

        Returns:
            The record; `layers[0]` is the new layer. Without changes since an earlier commit the image
            is the same.

        Raises:
            ImageError: There is more than a layer may hold, or the disk is full.
        """
        if name is not None:
            check_name(name)

        def add() -> ImageRecord:
            digest, hold = self._layers.add_directory(upper, upper=True, bytes_max=self._bytes_max)
            try:
                record = ImageRecord.make(
                    name,
                    (digest, *base.references),
                    config=config or base.config,
                    binds=base.recorded_binds,
                    origin=f"changes to {base.name}",
                )
                self._catalog.save(record)
            finally:
                hold.close()
            return record

        return await run_in_thread(lambda _: add())

    async def build(
        self,
        recipe: Recipe,
        run: Runner,
        name: str,
        *,
        on_step: Callable[[Step, bool], None] | None = None,
    ) -> ImageRecord:
        """Make an image by a recipe. Steps whose base, text and content are known are not run again.

        Args:
            recipe: Base and steps.
            run: Runs commands in boxes, which this package does not make.
            name: In the store.
            on_step: Told each step, and whether its result was known.

        Raises:
            ImageError: The base cannot be had, or a step cannot be done; what `run` raises.
        """
        check_name(name)
        async with self.using(recipe.base) as base:
            with ExitStack() as held:
                builder = Builder(
                    self._layers,
                    self._catalog,
                    self._mounts,
                    run,
                    bytes_max=self._bytes_max,
                    on_step=on_step,
                )
                image = await builder.build(recipe, base, held)
                record = ImageRecord.make(
                    name,
                    image.references,
                    config=image.config,
                    binds=image.recorded_binds,
                    origin=f"built on {base.name}",
                )
                await run_in_thread(lambda _: self._catalog.save(record))
        return record

    async def acquire(self, reference: str | Path) -> ResolvedImage:
        """Get an image ready for boxes to start from, until `release`.

        Args:
            reference: A name in the store; a reference to a registry, pulled where the store has not
                got it; a digest of an image or layer; `host`; or a path of a directory, with a slash
                in front or `./`, which is used where it is.

        Raises:
            ImageError: It cannot be had or mounted.
        """
        text = str(reference)
        if isinstance(reference, Path) or text.startswith(("/", "./", "../")):
            return await asyncio.to_thread(_resolve_directory, Path(reference))
        record = await asyncio.to_thread(self._find, text)
        if record is None:
            full = str(Reference.parse(text))
            async with self._pulls.setdefault(full, asyncio.Lock()):
                record = await asyncio.to_thread(self._find, full) or await self.pull(full)
        return await run_in_thread(lambda _: self._resolve(record), undo=self._give_back)

    def _find(self, name: str) -> ImageRecord | None:
        if name == HOST:
            if self._host is None or not self._has(self._host.layers[0]):
                self._host = self._make_host()
            return self._host
        record = self._catalog.find(name)
        if record is not None:
            return record
        if not is_digest(name):
            full = str(Reference.parse(name))
            return self._catalog.find(full) if full != name else None
        if self._has(name):
            return ImageRecord.make(None, (name,), config=ImageConfig())
        raise ImageError(f"no image or layer {name} in the store", hint="hadal image ls lists them")

    def _has(self, layer: str) -> bool:
        hold = self._layers.find(layer)
        if hold is not None:
            hold.close()
        return hold is not None

    def _make_host(self) -> ImageRecord:
        with self._layers.stage() as folder:
            binds = make_skeleton(folder / "skeleton")
            digest, hold = self._layers.add_directory(folder / "skeleton")
        try:
            record = ImageRecord.make(
                HOST, (digest,), config=ImageConfig(), binds=binds, origin="this machine"
            )
            self._catalog.save(record)
        finally:
            hold.close()
        return record

    def _resolve(self, record: ImageRecord) -> ResolvedImage:
        with ExitStack() as acquired:
            paths: list[Path] = []
            for layer in record.layers:
                if is_digest(layer):
                    paths.append(self._mounts.acquire(layer))
                    acquired.callback(self._mounts.release, layer)
                else:
                    paths.append(_directory(Path(layer)))
            acquired.pop_all()
        return ResolvedImage(
            name=record.name,
            digest=record.digest,
            layers=tuple(paths),
            references=record.layers,
            binds=tuple((Path(bind.source), bind.target, True) for bind in record.binds),
            config=record.config,
        )

    def disks_of(self, image: ResolvedImage) -> tuple[Path, ...]:
        """Return the layers of an image in use as files that a kernel mounts as disks, the top one first.

        Raises:
            ImageError: Not all of it lies in such files.
        """
        found: list[Path] = []
        for layer in image.references:
            hold = self._layers.find(layer) if is_digest(layer) else None
            if hold is not None:
                hold.close()  # whoever has acquired the image holds it
            if hold is None or hold.path.suffix != ".erofs" or image.binds:
                raise ImageError(
                    f"image {image.name} cannot be the disks of a machine: not all of it is EROFS images",
                    hint="import or pull it on a host with erofs-utils; `host` and directories are for"
                    " containers",
                )
            found.append(hold.path)
        return tuple(found)

    async def release(self, image: ResolvedImage) -> None:
        """Give back what `acquire` gave, once; boxes that run keep what they have mounted.

        Raises:
            ImageError: A mount cannot be taken away.
        """
        await run_in_thread(lambda _: self._give_back(image))

    def _give_back(self, image: ResolvedImage) -> None:
        for layer in image.references:
            if is_digest(layer):
                self._mounts.release(layer)

    @asynccontextmanager
    async def using(self, reference: str | Path) -> AsyncGenerator[ResolvedImage]:
        """`acquire`, and `release` at the end."""
        image = await self.acquire(reference)
        try:
            yield image
        finally:
            await self.release(image)

    async def close(self) -> None:
        """Unmount what nobody uses, and finish removing what is not needed. The store stays usable.

        Raises:
            ImageError: Something cannot be unmounted.
        """

        def finish() -> None:
            self._mounts.drop_idle()
            self._layers.settle()

        await run_in_thread(lambda _: finish())

    async def list(self) -> tuple[ImageRecord, ...]:
        """Return all images, by name.

        Raises:
            ImageError: A record cannot be read.
        """
        return await asyncio.to_thread(self._catalog.list)

    async def stored_bytes(self, record: ImageRecord) -> int:
        """Return the bytes on disk of an image's layers, those that it shares with others included."""

        def add_up() -> int:
            return sum(self._layers.stored_bytes(x) for x in record.layers if is_digest(x))

        return await asyncio.to_thread(add_up)

    async def remove(self, name: str) -> None:
        """Forget an image; its layers go with the next `prune`, when nothing uses them.

        Raises:
            ImageError: There is none of this name.
        """

        def remove() -> None:
            record = None if name == HOST else self._catalog.find(name)
            if record is None and not is_digest(name) and name != HOST:
                record = self._catalog.find(str(Reference.parse(name)))
            self._catalog.remove(record.name if record is not None else name)

        await asyncio.to_thread(remove)
        if name == HOST:
            self._host = None

    async def prune(self, in_use: Iterable[str] = ()) -> int:
        """Remove layers that no image refers to and nobody uses, and what killed processes left.

        Args:
            in_use: Digests of layers to keep besides: of boxes that a journal knows.

        Returns:
            Bytes of disk space that this freed.

        Raises:
            ImageError: A record cannot be read: then nothing is removed. Or something cannot be removed.
        """
        kept = frozenset(in_use)

        def referred() -> set[str]:
            return {layer for record in self._catalog.list() for layer in record.layers}

        def sweep() -> int:
            self._mounts.drop_idle()
            with image_errors("prune the image store"):
                freed = self._layers.sweep(referred, kept)
                self._catalog.sweep(self._layers.known())
            return freed

        return await run_in_thread(lambda _: sweep())


def _resolve_directory(path: Path) -> ResolvedImage:
    found = _directory(path.absolute())
    return ResolvedImage(
        name=str(found),
        digest=None,
        layers=(found,),
        references=(str(found),),
        binds=(),
        config=ImageConfig(),
    )


def _directory(path: Path) -> Path:
    if not path.is_dir():
        raise ImageError(
            f"{path} is not a directory", hint="a directory serves as a root file system"
        )
    return path

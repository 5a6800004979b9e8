"""`hadal image`: get, build, list and remove the images that boxes start from."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from hadal.cli.quantities import human_bytes, parse_bytes
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.node.images import ImageRecord, ImageStore, Step
    from hadal.node.images.ingest import Progress as ProgressCallback

__all__ = ["app"]

_T = TypeVar("_T")
app = App(name="image", help="Get, build, list and remove the images that boxes start from.")
Json = Annotated[bool, Parameter(name="--json", negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where images are kept.

    Attributes:
        store: Folder. Default: that of the embedded node.
        shared: Folder on a mount that many machines see, for the content of layers.
        compress: Compress new layers: smaller, slower to read.
    """

    store: Annotated[Path | None, Parameter(env_var="HADAL_IMAGES")] = None
    shared: Annotated[Path | None, Parameter(env_var="HADAL_SHARED_LAYERS")] = None
    compress: Annotated[bool, Parameter(negative="")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RegistryOptions:
    """How registries are reached. Logins are those of `docker login`.

    Attributes:
        mirror: REGISTRY=URL: a server that is asked before a registry; repeat for several.
        insecure: Host, with its port, that is spoken to without TLS; repeat for several.
    """

    mirror: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    insecure: Annotated[tuple[str, ...], Parameter(negative="")] = ()


@app.command
def pull(
    reference: str,
    *,
    where: StoreOptions | None = None,
    registry: RegistryOptions | None = None,
    json_output: Json = False,
) -> None:
    """Get an image from a registry.

    Examples:
        hadal image pull debian:12

        hadal image pull debian:12 --mirror docker.io=https://mirror.example

    Args:
        reference: As debian:12 or registry.example:5000/team/tool@sha256:….
        where: Where images are kept.
        registry: How registries are reached.
        json_output: Print the image as JSON.
    """
    store = _open(where, registry or RegistryOptions())
    with _progress_bars() as progress:
        record = _run(store, store.pull(reference, progress))
    _show(store, record, json_output=json_output)


@app.command
def build(
    recipe: Path,
    name: str,
    *,
    host_network: Annotated[bool, Parameter(negative="")] = False,
    where: StoreOptions | None = None,
    registry: RegistryOptions | None = None,
    json_output: Json = False,
) -> None:
    """Build an image by a recipe; steps that have not changed are not run again.

    A recipe is a TOML file: `base`, then `[[step]]` tables with `run`, with `copy` and `to`, or with
    environment, working_directory, user, entrypoint or command.

    Examples:
        hadal image build recipe.toml tools --host-network

    Args:
        recipe: The file; copies are taken from its folder.
        name: Of the image.
        host_network: Let commands use the network of this machine.
        where: Where images are kept.
        registry: How the registry of the base is reached.
        json_output: Print the image as JSON.
    """
    from hadal.node.build_boxes import BuildBoxes
    from hadal.node.images import Recipe

    loaded = Recipe.load(recipe)
    store = _open(where, registry or RegistryOptions())
    console = Console(stderr=True, highlight=False)

    def tell(step: "Step", known: bool) -> None:
        console.print(f"{step}{'  (known)' if known and step.run else ''}", markup=False)

    def show(output: bytes) -> None:
        sys.stderr.buffer.write(output)
        sys.stderr.flush()

    async def build_all() -> "ImageRecord":
        async with BuildBoxes.open(show, host_network=host_network) as boxes:
            return await store.build(loaded, boxes.run, name, on_step=tell)

    _show(store, _run(store, build_all()), json_output=json_output)


@app.command(name="import")
def import_(
    path: Path,
    name: str | None = None,
    *,
    select: str | None = None,
    where: StoreOptions | None = None,
    json_output: Json = False,
) -> None:
    """Import an archive (docker save, OCI), an OCI layout, or a directory as a root file system.

    Examples:
        hadal image import debian.tar

        debootstrap bookworm rootfs && hadal image import rootfs debian

    Args:
        path: File or directory.
        name: Of the image; needed for a plain directory. Default: what the archive calls it.
        select: Which image, by its name in an archive that has several.
        where: Where images are kept.
        json_output: Print the image as JSON.
    """
    store = _open(where, None)
    layout = (path / "index.json").exists() or (path / "manifest.json").exists()
    if path.is_dir() and not layout:
        if name is None:
            raise ConfigError(f"{path} is a plain directory", hint="give its image a name")
        record = _run(store, store.import_directory(path, name))
    else:
        work = store.import_layout if layout else store.import_archive
        with _progress_bars() as progress:
            record = _run(store, work(path, name=name, select=select, progress=progress))
    _show(store, record, json_output=json_output)


@app.command
def ls(*, where: StoreOptions | None = None, json_output: Json = False) -> None:
    """List the images.

    Examples:
        hadal image ls --json

    Args:
        where: Where images are kept.
        json_output: Print one JSON object for each image.
    """
    store = _open(where, None)
    records = asyncio.run(store.list())
    if json_output:
        for record in records:
            _show(store, record, json_output=True)
        return
    table = Table("image", "digest", box=None, padding=(0, 2))
    for title in ("layers", "on disk"):
        table.add_column(title, justify="right")
    for record in records:
        size = human_bytes(asyncio.run(store.stored_bytes(record)))
        table.add_row(escape(record.name), record.digest[7:19], str(len(record.layers)), size)
    Console().print(table)


@app.command
def rm(*names: str, where: StoreOptions | None = None) -> None:
    """Forget images; `hadal image prune` frees what only they had.

    Examples:
        hadal image rm debian:12

    Args:
        names: Of images.
        where: Where images are kept.
    """
    store = _open(where, None)
    for name in names:
        asyncio.run(store.remove(name))


@app.command
def prune(*, where: StoreOptions | None = None, json_output: Json = False) -> None:
    """Remove layers that no image has and no box uses, and what killed commands left.

    Examples:
        hadal image prune

    Args:
        where: Where images are kept.
        json_output: Print the bytes as JSON.
    """
    store = _open(where, None)
    freed = _run(store, store.prune())
    if json_output:
        print(json.dumps({"freed_bytes": freed}))  # noqa: T201 - data goes to stdout
    else:
        Console(highlight=False).print(f"freed {human_bytes(freed)}")


@app.command
def mount(
    source: str,
    mountpoint: Path,
    *,
    cache: Path,
    cache_size: Annotated[int, Parameter(converter=parse_bytes)] = 16 << 30,
) -> None:
    """Show the shared layers of a web server or slow directory, and fetch what is read of them.

    Runs until it is ended or unmounted. Other commands and nodes use MOUNTPOINT as their shared folder.

    Examples:
        hadal image mount https://layers.example/ /mnt/layers --cache /var/cache/hadal

    Args:
        source: URL or directory with the content of a shared folder.
        mountpoint: An empty directory.
        cache: Folder on a local disk for what has been read.
        cache_size: What it may take, as 16GiB.
    """
    from hadal.node.images.lazy import serve_lazily

    asyncio.run(serve_lazily(source, mountpoint, cache, bytes_max=cache_size))


def _open(where: StoreOptions | None, registry: RegistryOptions | None) -> "ImageStore":
    from hadal.node.images import ImageStore, RegistrySettings, default_folder
    from hadal.node.images.credentials import read_credentials

    options, reached = where or StoreOptions(), registry or RegistryOptions()
    mirrors: dict[str, tuple[str, ...]] = {}
    for text in reached.mirror:
        host, sign, url = text.partition("=")
        if not sign or not host or not url:
            raise ConfigError(
                f"--mirror {text!r:.200}: expected REGISTRY=URL",
                hint="as docker.io=https://mirror.example",
            )
        mirrors[host] = (*mirrors.get(host, ()), url)
    settings = RegistrySettings(
        mirrors=mirrors,
        insecure=frozenset(reached.insecure),
        credentials=read_credentials() if registry is not None else {},
    )
    root = options.store or default_folder()
    return ImageStore(root, registry=settings, compress=options.compress, shared=options.shared)


def _run(store: "ImageStore", work: Coroutine[Any, Any, _T]) -> _T:
    """Run one piece of work; leave nothing mounted and nothing to remove."""

    async def run() -> _T:
        try:
            return await work
        finally:
            await store.close()

    return asyncio.run(run())


def _show(store: "ImageStore", record: "ImageRecord", *, json_output: bool) -> None:
    size = asyncio.run(store.stored_bytes(record))
    if json_output:
        shown: dict[str, Any] = record.model_dump(mode="json") | {"stored_bytes": size}
        print(json.dumps(shown))  # noqa: T201 - data goes to stdout
        return
    Console(highlight=False, soft_wrap=True).print(
        f"{record.name}: {len(record.layers)} layers, {human_bytes(size)}, {record.digest}",
        markup=False,
    )


@contextlib.contextmanager
def _progress_bars() -> "Generator[ProgressCallback]":
    """Show a bar for each layer on a terminal; elsewhere nothing."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part[7:19], total=total)
            bars.update(tasks[part], completed=done)

        yield report

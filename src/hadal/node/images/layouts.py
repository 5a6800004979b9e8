"""What an OCI layout directory, or the content of an archive, has: OCI, or as `docker save` writes it.

The files may be anybody's: names in them lead nowhere outside the directory, and only regular files are
read, no more of them than announced.
"""

import asyncio
import functools
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from pydantic import RootModel

from hadal.errors import ImageError
from hadal.node.images.failures import image_errors
from hadal.node.images.ingest import Fetch, FoundImage
from hadal.node.images.oci import (
    METADATA_BYTES_MAX,
    ArchivedImage,
    Descriptor,
    Index,
    Manifest,
    OCIConfig,
    choose,
    parse,
    read_manifest,
)

__all__ = ["find_in_layout"]

_CHUNK = 1 << 20


class _ArchivedImages(RootModel[tuple[ArchivedImage, ...]]):
    pass


def find_in_layout(root: Path, *, select: str | None, what: str) -> tuple[FoundImage, str | None]:
    """Return an image of a layout, and what it is called there.

    Args:
        root: Directory with index.json (OCI) or manifest.json (docker save).
        select: Its name there; None where there is only one.
        what: The source, for messages.

    Raises:
        ImageError: There is no such image, or it is not for this machine, or not what it should be.
    """
    if (root / "index.json").exists():
        return _find_oci(root, select, what)
    if (root / "manifest.json").exists():
        return _find_docker(root, select, what)
    raise ImageError(
        f"{what} is not an image: expected index.json (OCI layout) or manifest.json (docker save)",
        hint="a plain directory is imported with a name: hadal image import DIRECTORY NAME",
    )


def _find_oci(root: Path, select: str | None, what: str) -> tuple[FoundImage, str | None]:
    index = parse(Index, _read(root, "index.json"), f"{what}: index.json")
    wanted = [d for d in index.manifests if select is None or select in (*d.names, d.digest)]
    for_us = [d for d in wanted if d.platform is None] or [
        choose(Index(manifests=tuple(wanted)), what)
    ]
    if len(for_us) > 1:
        raise _ambiguous(what, [d.names[0] if d.names else d.digest for d in for_us])
    chosen = for_us[0]
    names = chosen.names
    manifest = read_manifest(_read_blob(root, chosen), what)
    if isinstance(manifest, Index):
        manifest = read_manifest(_read_blob(root, choose(manifest, what)), what)
    if not isinstance(manifest, Manifest):
        raise ImageError(f"{what}: a list of images that lists lists")
    config = parse(OCIConfig, _read_blob(root, manifest.config), f"the config of {what}")
    fetches: list[Fetch] = [functools.partial(_check_blob, root, d) for d in manifest.layers]
    sizes = [layer.size for layer in manifest.layers]
    found = FoundImage.from_oci(config, sizes, fetches, what=what, origin=f"{what}@{chosen.digest}")
    return found, names[0] if names else None


def _find_docker(root: Path, select: str | None, what: str) -> tuple[FoundImage, str | None]:
    images = parse(_ArchivedImages, _read(root, "manifest.json"), f"{what}: manifest.json").root
    wanted = [image for image in images if select is None or select in (image.names or ())]
    if len(wanted) != 1:
        raise _ambiguous(what, [name for image in images for name in image.names or ()])
    image = wanted[0]
    data = _read(root, image.config)
    config = parse(OCIConfig, data, f"the config of {what}")
    fetches: list[Fetch] = [functools.partial(_use_file, root, name) for name in image.layers]
    sizes = [_locate(root, name)[1] for name in image.layers]
    origin = f"{what}@sha256:{hashlib.sha256(data).hexdigest()}"
    found = FoundImage.from_oci(config, sizes, fetches, what=what, origin=origin)
    return found, image.names[0] if image.names else None


def _ambiguous(what: str, names: list[str]) -> ImageError:
    there = ", ".join(names[:20]) or "none that has a name"
    return ImageError(
        f"{what}: expected exactly one image to choose, there are: {there}",
        hint="say which: hadal image import PATH --select NAME",
    )


async def _use_file(root: Path, name: str, folder: Path, report: Callable[[int], None]) -> Path:
    """Use a layer where it lies: its content is checked when it is unpacked."""
    path, size = await asyncio.to_thread(_locate, root, name)
    report(size)
    return path


async def _check_blob(
    root: Path, wanted: Descriptor, folder: Path, report: Callable[[int], None]
) -> Path:
    def check() -> Path:
        path, size = _locate(root, _blob_name(wanted))
        if size != wanted.size:
            raise ImageError(f"{wanted.digest} has {size:,} bytes, expected {wanted.size:,}")
        sha, done = hashlib.sha256(), 0
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                sha.update(data)
                done += len(data)
                report(done)
        _check_digest(sha.hexdigest(), wanted)
        return path

    return await asyncio.to_thread(check)


def _blob_name(wanted: Descriptor) -> str:
    return f"blobs/{wanted.digest.replace(':', '/')}"


def _check_digest(found: str, wanted: Descriptor) -> None:
    if f"sha256:{found}" != wanted.digest:
        raise ImageError(f"a blob has digest sha256:{found}, expected {wanted.digest}")


def _read_blob(root: Path, wanted: Descriptor) -> bytes:
    data = _read(root, _blob_name(wanted))
    _check_digest(hashlib.sha256(data).hexdigest(), wanted)
    return data


def _read(root: Path, name: str) -> bytes:
    path, size = _locate(root, name)
    if size > METADATA_BYTES_MAX:
        raise ImageError(f"{name!r:.200}: {size:,} bytes; expected at most {METADATA_BYTES_MAX:,}")
    return path.read_bytes()


def _locate(root: Path, name: str) -> tuple[Path, int]:
    """Return a regular file inside a directory, links followed, and its size."""
    if "\0" in name:
        raise ImageError(f"not the name of a file: {name!r:.200}")
    with image_errors("read an image"):
        path = Path(os.path.realpath(root / name))
        inside = path.is_relative_to(os.path.realpath(root))
        status = path.stat() if inside else None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name!r:.200} is not a file of this image")
    return path, status.st_size

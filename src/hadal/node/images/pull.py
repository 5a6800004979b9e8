"""What a registry has under a reference."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.images.ingest import FoundImage
from hadal.node.images.oci import (
    METADATA_BYTES_MAX,
    Descriptor,
    Index,
    Manifest,
    OCIConfig,
    choose,
    parse,
    read_manifest,
)
from hadal.node.images.registry import Repository

__all__ = ["find_in_registry"]


async def find_in_registry(repository: Repository, folder: Path) -> FoundImage:
    """Return the image that a reference names, for this machine.

    Args:
        repository: Of the reference.
        folder: For its config.

    Raises:
        ImageError: It is not there, or not for this machine, or not what it should be.
    """
    reference = repository.reference
    what = str(reference)
    data = await repository.manifest(reference.digest or reference.tag or "latest")
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    manifest = read_manifest(data, what)
    if isinstance(manifest, Index):
        manifest = read_manifest(await repository.manifest(choose(manifest, what).digest), what)
    if not isinstance(manifest, Manifest):
        raise ImageError(f"{what}: a list of images that lists lists")
    config = await _read_config(repository, manifest, folder)
    origin = f"{reference.registry}/{reference.repository}@{digest}"
    blobs = [functools.partial(_fetch, repository, layer) for layer in manifest.layers]
    sizes = [layer.size for layer in manifest.layers]
    return FoundImage.from_oci(config, sizes, blobs, what=what, origin=origin)


async def _read_config(repository: Repository, manifest: Manifest, folder: Path) -> OCIConfig:
    if manifest.config.size > METADATA_BYTES_MAX:
        raise ImageError(
            f"a config of {manifest.config.size:,} bytes; expected at most {METADATA_BYTES_MAX:,}"
        )
    file = folder / "config"
    await repository.blob(manifest.config, file, lambda _: None)
    return parse(OCIConfig, file.read_bytes(), f"the config of {repository.reference}")


async def _fetch(
    repository: Repository, layer: Descriptor, folder: Path, report: Callable[[int], None]
) -> Path:
    target = folder / "blob"
    await repository.blob(layer, target, report)
    return target

"""The records of images, one small file each, replaced as a whole."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hadal.errors import ImageError
from hadal.node.images.durable import sync_path
from hadal.node.images.failures import image_errors
from hadal.node.images.layers import Layers
from hadal.node.images.records import ImageRecord, file_name, is_digest

__all__ = ["Catalog"]

_RECORD_BYTES_MAX = 16 << 20


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    layer: str


class Catalog:
    """Records of images, and the layers of build steps that have been run.

    Args:
        layers: Of the same store.
    """

    def __init__(self, layers: Layers) -> None:
        root = layers.root
        self._layers = layers
        self._images = root / "images"
        self._steps = root / "steps"
        with image_errors("make the image store"):
            for folder in (self._images, self._steps):
                folder.mkdir(exist_ok=True, mode=0o700)

    def find(self, name_or_digest: str) -> ImageRecord | None:
        """Return the image of a name, or one with a digest; None if there is none.

        Raises:
            ImageError: Its record cannot be read.
        """
        record = self._read(self._images / file_name(name_or_digest))
        if record is None and is_digest(name_or_digest):
            return next((r for r in self.list() if r.digest == name_or_digest), None)
        return record

    def list(self) -> tuple[ImageRecord, ...]:
        """Return all images, by name.

        Raises:
            ImageError: A record cannot be read.
        """
        with image_errors("list the images"):
            paths = list(self._images.glob("*.json"))
        found = (self._read(path) for path in paths)
        records = (record for record in found if record is not None)
        return tuple(sorted(records, key=lambda record: record.name))

    def _read(self, path: Path) -> ImageRecord | None:
        with image_errors("read the record of an image"):
            try:
                with path.open("rb") as file:
                    data = file.read(_RECORD_BYTES_MAX)
            except FileNotFoundError:
                return None
        try:
            return ImageRecord.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ImageError(
                f"the record {path} cannot be read: {first['msg']}",
                hint="remove the file and pull or import the image again",
            ) from error

    def save(self, record: ImageRecord) -> None:
        """Write a record; what had its name before is replaced. It is there whole, or not at all.

        Raises:
            ImageError: The disk is full.
        """
        self._write(self._images / file_name(record.name), record.model_dump_json(indent=1))

    def remove(self, name: str) -> None:
        """Remove a record.

        Raises:
            ImageError: There is none.
        """
        with image_errors("remove an image"):
            try:
                (self._images / file_name(name)).unlink()
            except FileNotFoundError as error:
                raise ImageError(
                    f"no image {name!r:.200} in the store", hint="hadal image ls lists them"
                ) from error
            sync_path(self._images)

    def find_step(self, key: str) -> str | None:
        """Return the digest of the layer that a build step made; None if it is not known."""
        try:
            return _Step.model_validate_json((self._steps / f"{key}.json").read_bytes()).layer
        except (FileNotFoundError, ValidationError):
            return None  # then the step runs again

    def save_step(self, key: str, layer: str) -> None:
        """Remember the layer of a build step.

        Raises:
            ImageError: The disk is full.
        """
        self._write(self._steps / f"{key}.json", _Step(layer=layer).model_dump_json())

    def sweep(self, layers: set[str]) -> None:
        """Forget build steps whose layers are gone.

        Args:
            layers: That are there.
        """
        for path in self._steps.glob("*.json"):
            if self.find_step(path.stem) not in layers:
                path.unlink(missing_ok=True)

    def _write(self, path: Path, text: str) -> None:
        with self._layers.stage() as folder:
            part = folder / "record"
            with part.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync_path(path.parent)

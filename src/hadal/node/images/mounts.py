"""Layers in use: each held, mounted once in this mount namespace, and counted."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.images.erofs import mount_erofs
from hadal.node.images.failures import image_errors
from hadal.node.images.layers import Hold, Layers

__all__ = ["Mounts"]


@dataclass
class _Used:
    hold: Hold
    path: Path
    count: int = 1


class Mounts:
    """The layers that this process uses. For use from several threads.

    A mount that nobody uses any more is kept for the next box, and any other process may take it away.

    Args:
        layers: Of the store.
        idle_max: Mounts that are kept though nobody uses them.
    """

    def __init__(self, layers: Layers, *, idle_max: int = 64) -> None:
        self._layers = layers
        self._idle_max = idle_max
        self._lock = threading.Lock()
        self._used: dict[str, _Used] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()

    def acquire(self, digest: str) -> Path:
        """Return the directory of a layer; it stays until `release`.

        Raises:
            ImageError: There is no such layer, or it cannot be mounted.
        """
        with self._lock:
            used = self._used.get(digest)
            if used is not None:
                used.count += 1
                return used.path
            hold = self._layers.find(digest)
            if hold is None:
                raise ImageError(
                    f"no layer {digest} in the image store {self._layers.root}",
                    hint="pull or import the image again",
                )
            try:
                path = hold.path if hold.path.suffix == ".tree" else self._mount(hold.path, digest)
            except BaseException:
                hold.close()
                raise
            self._idle.pop(digest, None)
            self._used[digest] = _Used(hold, path)
            return path

    def _mount(self, image: Path, digest: str) -> Path:
        point = self._layers.mount_point(digest)
        # Locked, else two processes mount it twice.
        with image_errors(f"mount the layer {digest}"), self._layers.lock_mounts():
            point.mkdir(exist_ok=True)
            if not point.is_mount():
                mount_erofs(image, point, self._blob(image, digest))
        return point

    def _blob(self, image: Path, digest: str) -> Path | None:
        if image.suffix != ".meta":
            return None
        assert self._layers.shared is not None, "metadata is found with its folder only"
        return self._layers.shared.blob(digest)

    def release(self, digest: str) -> None:
        """Give back what `acquire` gave.

        Raises:
            ImageError: A mount that is not needed any more cannot be taken away.
        """
        with self._lock:
            used = self._used.get(digest)
            assert used is not None, "released more often than acquired"
            used.count -= 1
            if used.count:
                return
            del self._used[digest]
            used.hold.close()
            if used.path != used.hold.path:
                self._idle[digest] = None
                self._trim(self._idle_max)

    def drop_idle(self) -> None:
        """Unmount what nobody uses.

        Raises:
            ImageError: Something cannot be unmounted.
        """
        with self._lock:
            self._trim(0)

    def _trim(self, most: int) -> None:
        with image_errors("unmount a layer"):
            while len(self._idle) > most:
                digest, _ = self._idle.popitem(last=False)
                self._layers.unmount_idle(digest)

"""Roots without a store: a directory of the node, or the node's own /usr."""

from pathlib import Path

from hadal.errors import ImageError
from hadal.node.node import Root

__all__ = ["PlainImages"]

_DIRECTORIES = ("usr", "etc", "tmp", "proc", "sys", "dev", "root", "var/tmp", "run", "home", "opt")
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


class PlainImages:
    """Directories only.

    Args:
        folder: For the skeleton of `host`.
    """

    def __init__(self, folder: Path) -> None:
        self._skeleton = folder / "host"

    async def acquire(self, reference: str, holder: str) -> Root:
        """Return the root of `host`, or of a directory."""
        if reference == "host":
            self._make_skeleton()
            return Root(layers=(self._skeleton,), binds=((Path("/usr"), "/usr"),))
        if not reference.startswith("/") or not Path(reference).is_dir():
            raise ImageError(f"no image {reference!r}: expected `host` or a directory")
        return Root(layers=(Path(reference),))

    async def release(self, holder: str) -> None:
        """Nothing is kept."""

    def _make_skeleton(self) -> None:
        if self._skeleton.exists():
            return
        part = self._skeleton.with_suffix(".part")
        for name in _DIRECTORIES:
            (part / name).mkdir(parents=True, exist_ok=True)
        for name in ("tmp", "var/tmp"):
            (part / name).chmod(0o1777)
        for name in _LINKS:
            if Path("/", name).is_symlink():
                (part / name).symlink_to(f"usr/{name}")
        (part / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (part / "etc/group").write_text("root:x:0:\n")
        part.rename(self._skeleton)

"""Snapshots of machines that are kept, with memory and processes: others start from them, now or after a restart.

Each is a folder as in `snapshots`, with `about.json` beside: what the machine was.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hadal.errors import ConfigError, ImageError
from hadal.node.machines.memory import load_memory
from hadal.node.machines.named_folders import NamedFolders
from hadal.node.machines.snapshots import Snapshot, is_whole, link_disks, seal
from hadal.node.sparse import copy_not_zero
from hadal.sandbox.specs import Spec

__all__ = ["KeptMachine", "KeptMachines", "check_alike", "is_kept"]

_PREFIX = "machine@"
"""No name of an image begins like that: what follows an @ in one is a digest."""
_ABOUT = "about.json"
_HARDWARE = ("memory_mb", "cpus", "disk_mb", "inodes", "pids", "shm_mb")
"""Fields of a spec that a machine cannot change."""


def is_kept(reference: str | None) -> bool:
    """Return whether a reference is one of a machine that was kept, and not of an image."""
    return reference is not None and reference.startswith(_PREFIX)


def check_alike(spec: Spec, kept: "KeptMachine") -> None:
    """Refuse a spec that asks for something else than the machine has that it is to start from.

    Raises:
        ConfigError: With the field, and both values.
    """
    if spec.backend != kept.spec["backend"]:
        raise ConfigError(
            f"box spec: from: {kept.reference} is a {kept.spec['backend']}, and cannot go on as a {spec.backend}"
        )
    wanted, has = spec.model_dump(mode="json", by_alias=True), kept.spec
    for name in _HARDWARE:
        if wanted[name] != has[name]:
            raise ConfigError(
                f"box spec: {name}: {kept.reference} has {has[name]}, got {wanted[name]}",
                hint=f"a machine goes on with what it has: give {name}={has[name]}",
            )
    if (spec.network.default == "none") != (has["network"]["default"] == "none"):
        raise ConfigError(
            f"box spec: network: {kept.reference} was made {'without' if spec.network.default != 'none' else 'with'} one",
            hint="a machine goes on with the devices that it has",
        )


@dataclass(frozen=True)
class KeptMachine:
    """What is known of one.

    Attributes:
        reference: As `from_` of a spec takes it.
        spec: Of the machine.
        image: Digest of its image.
        kind: Of QEMU and of what it has of hardware; only the same starts it.
        created_ns: When it was kept, since 1970.
        size: Bytes that it takes on the disk.
    """

    reference: str
    spec: dict[str, Any]
    image: str
    kind: str
    created_ns: int
    size: int


class KeptMachines:
    """Those of a node.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folders = NamedFolders(folder, "machine that is kept")

    def keep(self, name: str | None, snapshot: Snapshot, about: KeptMachine) -> str:
        """Keep a snapshot, and return its reference; one that had the name is replaced.

        Args:
            name: For it. Default: one is made up.
            snapshot: That.
            about: What is known of it, but for its reference and size.

        Raises:
            ConfigError: It cannot have that name.
            OSError: The disk is full.
        """
        name = uuid.uuid4().hex[:16] if name is None else name
        with self._folders.new(name) as part:
            link_disks(snapshot.disks, part / "disks")
            shutil.copyfile(snapshot.devices, part / "devices")
            with (part / "memory").open("xb") as file:
                copy_not_zero(snapshot.memory, file.fileno())
                os.fsync(file.fileno())
            text = json.dumps(asdict(about) | {"reference": _PREFIX + name})
            (part / _ABOUT).write_text(text, encoding="utf-8")
            seal(part)
        return _PREFIX + name

    def sweep(self) -> None:
        """Remove what an earlier daemon has left half done."""
        self._folders.sweep(left_s=0)

    def about(self, reference: str) -> KeptMachine:
        """Return what is known of one.

        Raises:
            ImageError: There is none, or it is damaged.
        """
        return self._read(self._path(reference))

    @contextlib.contextmanager
    def opened(self, reference: str) -> Generator[Snapshot]:
        """Yield one, for machines to start from.

        Raises:
            ImageError: There is none, or it is damaged.
            OSError: There is too little memory.
        """
        folder = self._path(reference)
        if not is_whole(folder):
            raise ImageError(
                f"{reference} is damaged", hint="its files are not as they were written: remove it"
            )
        memory = load_memory(folder / "memory")
        try:
            yield Snapshot(folder, memory)
        finally:
            os.close(memory)

    def list(self) -> list[KeptMachine]:
        """Return all that can be read, the oldest first."""
        found: list[KeptMachine] = []
        for name in self._folders.names():
            with contextlib.suppress(ImageError):
                found.append(self._read(self._folders.path(name)))
        return sorted(found, key=lambda kept: kept.created_ns)

    def remove(self, reference: str) -> None:
        """Remove one; machines that were started from it live on.

        Raises:
            ImageError: There is none.
        """
        self._folders.remove(self._path(reference).name)

    def _path(self, reference: str) -> Path:
        path = self._folders.path(reference.removeprefix(_PREFIX))
        if not path.is_dir():
            raise ImageError(
                f"no machine was kept as {reference}", hint="`hadal node snapshots` lists them"
            )
        return path

    def _read(self, folder: Path) -> KeptMachine:
        try:
            fields = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            size = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
            return KeptMachine(**fields | {"size": size})
        except (OSError, ValueError, TypeError) as error:
            raise ImageError(f"{_PREFIX}{folder.name} is damaged: {error}") from error

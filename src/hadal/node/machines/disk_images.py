"""Disk images of whole machines: a system with its own kernel, that boots from its disk.

Each is a folder with `disks/`, a chain of files as in `snapshots` whose lowest is raw, and `about.json`. Machines
stand on its files by hard links: it can be removed while they live.
"""

import contextlib
import json
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hadal.errors import ConfigError, ImageError, UnsupportedError
from hadal.node.images import ImageConfig, ResolvedImage
from hadal.node.machines.named_folders import NamedFolders
from hadal.node.machines.snapshots import link_disks
from hadal.sandbox.specs import DISK_IMAGE, Firmware, GuestProgram

__all__ = [
    "DiskImage",
    "DiskImages",
    "disk_image_root",
    "disk_images_folder",
    "is_disk_image",
]

_ABOUT = "about.json"
_QCOW2 = b"QFI\xfb"
_DATA_FILE = 1 << 2
"""Bit of qcow2's incompatible features: the content lies in another file."""
_SECTOR = 512


def disk_images_folder(state: Path) -> Path:
    """Return where a node has its disk images, below its state folder."""
    return state / "machines" / "disks"


def is_disk_image(reference: str | None) -> bool:
    """Return whether a reference is one of a disk image."""
    return reference is not None and reference.startswith(DISK_IMAGE)


def disk_image_root(reference: str) -> ResolvedImage:
    """Return a disk image as the root of a box, which has no layers: the system in it says all else."""
    return ResolvedImage(
        name=reference, digest=None, layers=(), references=(), binds=(), config=ImageConfig()
    )


@dataclass(frozen=True)
class DiskImage:
    """What is known of one.

    Attributes:
        reference: As `image` of a spec takes it.
        id: Its own, also when another one gets its name.
        source: Where it comes from.
        created_ns: When it was made, since 1970.
        size: Bytes of the disk that machines see.
        stored: Bytes that it takes here.
        firmware: That it boots by, where a spec does not say.
        guest: How it comes to the guest program, where a spec does not say.
    """

    reference: str
    id: str
    source: str
    created_ns: int
    size: int
    stored: int = 0
    firmware: Firmware = "bios"
    guest: GuestProgram = "installed"


class DiskImages:
    """Those of a node.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folders = NamedFolders(folder, "disk image")

    def add_file(
        self,
        name: str,
        file: Path,
        *,
        firmware: Firmware = "bios",
        guest: GuestProgram = "installed",
    ) -> DiskImage:
        """Add a disk image, raw or qcow2; one that had the name is replaced.

        Args:
            name: For it.
            file: That; it is copied.
            firmware: That it boots by.
            guest: How it comes to the guest program.

        Raises:
            ConfigError: It cannot have that name, or the file is something else, or leads to others.
            UnsupportedError: This host has no qemu-img.
            OSError: The disk is full, or the file cannot be read.
        """
        kind = _kind_of(file)

        def make(target: Path) -> None:
            call = ["qemu-img", "convert", "-f", kind, "-O", "raw", str(file), str(target)]
            try:
                done = subprocess.run(call, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                hint = "Debian: apt-get install qemu-utils"
                raise UnsupportedError("no qemu-img to read a disk with", hint=hint) from error
            if done.returncode:
                raise ConfigError(f"{file}: qemu-img: {done.stderr.strip()[-500:]}")

        return self.make(name, str(file), make, firmware=firmware, guest=guest)

    def make(
        self, name: str, source: str, write: Callable[[Path], None], *, firmware: Firmware = "bios",
        guest: GuestProgram = "installed",
    ) -> DiskImage:  # fmt: skip
        """Add a disk that somebody writes; one that had the name is replaced.

        Args:
            name: For it.
            source: Where it comes from, for people.
            write: Given the path of a new file, writes it, raw.
            firmware: That it boots by.
            guest: How it comes to the guest program.

        Raises:
            ConfigError: It cannot have that name.
            OSError: The disk is full.
        """
        with self._folders.new(name) as part:
            (part / "disks").mkdir(mode=0o700)
            write(part / "disks/0")
            return self._described(name, source, part, firmware, guest)

    def keep(
        self, name: str, source: str, disks: Path, *, firmware: Firmware, guest: GuestProgram
    ) -> DiskImage:
        """Add a chain of files as it is; one that had the name is replaced.

        Args:
            name: For it.
            source: Where it comes from, for people.
            disks: Their folder.
            firmware: That it boots by.
            guest: How it comes to the guest program.

        Raises:
            ConfigError: It cannot have that name.
            UnsupportedError: They are too many.
            OSError: The disk is full.
        """
        with self._folders.new(name) as part:
            link_disks(disks, part / "disks")
            return self._described(name, source, part, firmware, guest)

    def _described(
        self, name: str, source: str, part: Path, firmware: Firmware, guest: GuestProgram
    ) -> DiskImage:
        size = (part / "disks/0").stat().st_size
        if size % _SECTOR or not size:
            raise ConfigError(f"{source} is no disk: {size:,} bytes are no whole sectors")
        for path in (part / "disks").iterdir():
            path.chmod(0o444)
        made = DiskImage(
            DISK_IMAGE + name, uuid.uuid4().hex, source, time.time_ns(), size, firmware=firmware, guest=guest
        )  # fmt: skip
        (part / _ABOUT).write_text(json.dumps(asdict(made)), encoding="utf-8")
        return made

    def sweep(self) -> None:
        """Remove what an earlier process has left half done, a day ago or more."""
        self._folders.sweep()

    def find(self, reference: str) -> DiskImage:
        """Return what is known of one.

        Raises:
            ImageError: There is none, or it is damaged.
        """
        folder = self._path(reference)
        try:
            fields = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            stored = sum(p.stat().st_blocks * 512 for p in (folder / "disks").iterdir())
            return DiskImage(**fields | {"stored": stored})
        except (OSError, ValueError, TypeError) as error:
            raise ImageError(f"{reference} is damaged: {error}") from error

    def disks(self, reference: str) -> Path:
        """Return the chain of files of one.

        Raises:
            ImageError: There is none.
        """
        return self._path(reference) / "disks"

    def _path(self, reference: str) -> Path:
        path = self._folders.path(reference.removeprefix(DISK_IMAGE))
        if not path.is_dir():
            raise ImageError(f"no disk image {reference}", hint="`hadal disk ls` lists them")
        return path

    def list(self) -> list[DiskImage]:
        """Return all that can be read, the oldest first."""
        found: list[DiskImage] = []
        for name in self._folders.names():
            with contextlib.suppress(ImageError):
                found.append(self.find(DISK_IMAGE + name))
        return sorted(found, key=lambda one: one.created_ns)

    def remove(self, reference: str) -> None:
        """Remove one; machines that were made from it live on.

        Raises:
            ImageError: There is none.
        """
        self._folders.remove(self._path(reference).name)


def _kind_of(file: Path) -> str:
    """Return the format of a file.

    Raises:
        ConfigError: It is not one that can be read without reading others.
    """
    try:
        with file.open("rb") as disk:
            head = disk.read(104)
    except OSError as error:
        raise ConfigError(f"no disk image {file}: {error.strerror}") from error
    if not head.startswith(_QCOW2):
        if head[:4] in (b"KDMV", b"cone") or head.startswith(b"<<< ") or file.suffix == ".vdi":
            raise ConfigError(
                f"{file}: disk images are raw or qcow2", hint="qemu-img convert -O qcow2 makes one"
            )
        return "raw"
    version, backing = struct.unpack(">IQ", head[4:16])
    features = struct.unpack(">Q", head[72:80])[0] if version >= 3 and len(head) >= 80 else 0
    if backing or features & _DATA_FILE:
        raise ConfigError(
            f"{file} stands on another file", hint="qemu-img convert makes one file of both"
        )
    return "qcow2"

"""GRUB, as what a disk boots by: before the first partition for a BIOS, and as a program for UEFI."""

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from hadal.errors import NodeError, UnsupportedError

__all__ = ["FIRST_SECTOR", "SECTOR", "bios_loader", "find_mkimage", "uefi_loader"]

SECTOR = 512
FIRST_SECTOR = 2048
"""Of the first partition; before it is room for GRUB."""
_BIOS = Path("/usr/lib/grub/i386-pc")
_UEFI = Path("/usr/lib/grub/x86_64-efi")
_MODULES = ("part_msdos", "ext2", "linux", "boot", "search", "search_fs_uuid")
_TABLE = 446
"""Where the table of partitions is, in the first sector."""


def find_mkimage() -> str:
    """Return the program that makes GRUB of its parts.

    Raises:
        UnsupportedError: It is not here, or one of both kinds of parts is not.
    """
    mkimage = shutil.which("grub-mkimage")
    if mkimage is None or not _BIOS.is_dir() or not _UEFI.is_dir():
        raise UnsupportedError(
            "no GRUB for BIOS and UEFI, to make a disk with",
            hint="Debian: apt-get install grub-pc-bin grub-efi-amd64-bin",
        )
    return mkimage


def bios_loader(mkimage: str, script: str, table: bytes) -> bytes:
    """Return the first sectors of a disk: with them a BIOS starts GRUB.

    Args:
        mkimage: That program.
        script: What GRUB does.
        table: Of the partitions, 64 bytes.

    Raises:
        NodeError: It cannot be made, or is too large.
    """
    loader = bytearray(_image(mkimage, "i386-pc", _BIOS, script, "biosdisk"))
    sectors = -(-len(loader) // SECTOR)
    if sectors > FIRST_SECTOR - 1:
        raise NodeError(f"GRUB has {sectors} sectors, and there is room for {FIRST_SECTOR - 1}")
    # The first sector of GRUB ends with where the others are: start, number, segment of memory.
    struct.pack_into("<QHH", loader, SECTOR - 12, 2, sectors - 1, 0x820)
    first = bytearray((_BIOS / "boot.img").read_bytes()[:SECTOR])
    struct.pack_into("<Q", first, 0x5C, 1)  # where GRUB begins
    first[_TABLE:SECTOR] = table + b"\x55\xaa"
    return bytes(first + loader)


def uefi_loader(mkimage: str, script: str) -> bytes:
    """Return GRUB as a program that UEFI starts.

    Args:
        mkimage: That program.
        script: What it does.

    Raises:
        NodeError: It cannot be made.
    """
    return _image(mkimage, "x86_64-efi", _UEFI, script)


def _image(mkimage: str, target: str, parts: Path, script: str, *modules: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="hadal-grub-") as folder:
        text, made = Path(folder, "grub.cfg"), Path(folder, "image")
        text.write_text(script, encoding="utf-8")
        call = [
            mkimage, "-O", target, "-d", str(parts), "-p", "/boot/grub", "-c", str(text), "-o", str(made),
            *_MODULES, *modules,
        ]  # fmt: skip
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NodeError(f"grub-mkimage fails: {done.stderr.strip()[-500:]}")
        return made.read_bytes()

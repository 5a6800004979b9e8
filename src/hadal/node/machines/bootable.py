"""A disk that boots, made of an image that has a kernel, an init and systemd: what a container's image becomes a PC by.

The disk has a partition table of the old kind and two partitions: an ext4 with the files of the image and our guest
program as a service, and a small one that UEFI starts GRUB from. A BIOS starts it from before the first.
"""

import re
import shutil
import struct
import subprocess
import tempfile
import uuid
from pathlib import Path

from hadal.errors import ImageError, NodeError, UnsupportedError
from hadal.node.guest_program import guest_program
from hadal.node.machines.fat import make_fat
from hadal.node.machines.grub import FIRST_SECTOR, SECTOR, bios_loader, find_mkimage, uefi_loader
from hadal.node.machines.guest_service import PROGRAM, UNIT

__all__ = ["find_tools", "make_bootable"]

_LINUX, _UEFI = 0x83, 0xEF
"""Kinds of partitions."""
_UEFI_MB = 8
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
"""Of ext4: what GRUB 2.06 can read, whatever is the default here."""
_OPTIONS = "console=tty0 console=ttyS0 net.ifnames=0 mitigations=off"


def make_bootable(
    layers: tuple[Path, ...], path: Path, size_mb: int, *, with_guest: bool = True
) -> None:
    """Write a disk with the files of an image, which boots by BIOS and by UEFI.

    Args:
        layers: Directories of the image, the top one first.
        path: Of the disk, a new file.
        size_mb: MiB of it.
        with_guest: Whether it gets our guest program.

    Raises:
        UnsupportedError: This host lacks a tool for it.
        ImageError: The image has no kernel, or does not fit.
        NodeError: A tool fails.
    """
    mke2fs, mkimage = find_tools()
    kernel, initrd = _kernel_of(layers)
    identity = str(uuid.uuid4())
    script = (
        f"search --no-floppy --fs-uuid --set=root {identity}\n"
        f"linux {kernel} root=UUID={identity} ro {_OPTIONS}\ninitrd {initrd}\nboot\n"
    )
    sectors = ((size_mb - _UEFI_MB) << 20) // SECTOR - FIRST_SECTOR
    with tempfile.TemporaryDirectory(prefix="hadal-disk-") as folder:
        work = Path(folder)
        _add_files(work / "added", identity, with_guest=with_guest)
        with path.open("xb") as disk:
            disk.truncate(size_mb << 20)
        _write_files(mke2fs, (work / "added", *layers), path, sectors, identity, work / "root")
        files = {"EFI/BOOT/BOOTX64.EFI": uefi_loader(mkimage, script)}
        make_fat(work / "uefi", _UEFI_MB, "UEFI", files)
        table = _entry(_LINUX, FIRST_SECTOR, sectors, boots=True)
        table += _entry(_UEFI, FIRST_SECTOR + sectors, (_UEFI_MB << 20) // SECTOR)
        with path.open("r+b") as disk:
            disk.write(bios_loader(mkimage, script, table.ljust(64, b"\0")))
            disk.seek((FIRST_SECTOR + sectors) * SECTOR)
            disk.write((work / "uefi").read_bytes())


def find_tools() -> tuple[str, str]:
    """Return the programs that make such disks: mke2fs and grub-mkimage.

    Raises:
        UnsupportedError: One of them is not here, or one of those that they need.
    """
    mke2fs = shutil.which("mke2fs")
    if mke2fs is None or shutil.which("mkfs.fat") is None or shutil.which("mcopy") is None:
        raise UnsupportedError(
            "no mke2fs, mkfs.fat or mcopy to make a disk with",
            hint="Debian: apt-get install e2fsprogs dosfstools mtools",
        )
    return mke2fs, find_mkimage()


def _entry(kind: int, start: int, length: int, *, boots: bool = False) -> bytes:
    """Return a partition in the table: where it is in sectors, and nothing of cylinders."""
    flag, far = 0x80 if boots else 0, b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", flag, far, kind, far, start, length)


def _kernel_of(layers: tuple[Path, ...]) -> tuple[str, str]:
    """Return kernel and initial RAM disk of an image, as paths in it.

    Raises:
        ImageError: It has none.
    """
    names = {path.name for layer in layers for path in _listed(layer / "boot")}
    versions = [n.removeprefix("vmlinuz-") for n in names if n.startswith("vmlinuz-")]
    both = [version for version in versions if f"initrd.img-{version}" in names]
    if not both:
        raise ImageError(
            "the image has no kernel with an initial RAM disk in /boot",
            hint="in a box: apt-get install linux-image-amd64 systemd-sysv, then snapshot it",
        )
    newest = max(both, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])
    return f"/boot/vmlinuz-{newest}", f"/boot/initrd.img-{newest}"


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _add_files(folder: Path, identity: str, *, with_guest: bool) -> None:
    """Make the layer above the image: as a layer, it follows no link of the image."""
    units = folder / "etc/systemd/system"
    wanted = units / "multi-user.target.wants"
    (folder / "etc").mkdir(parents=True)
    if with_guest:
        for directory in (wanted, (folder / PROGRAM).parent):
            directory.mkdir(parents=True)
        shutil.copyfile(guest_program(), folder / PROGRAM)
        (units / "hadal-guest.service").write_text(UNIT, encoding="ascii")
        (wanted / "hadal-guest.service").symlink_to("../hadal-guest.service")
    for directory in (folder, *folder.rglob("*")):
        if directory.is_dir() or directory == folder / PROGRAM:
            directory.chmod(0o755)
    fstab = f"UUID={identity} / ext4 errors=remount-ro,discard 0 1\n"
    (folder / "etc/fstab").write_text(fstab, encoding="ascii")


def _write_files(
    mke2fs: str, layers: tuple[Path, ...], disk: Path, sectors: int, identity: str, root: Path
) -> None:
    """Make the file system, of all layers seen as one; they are mounted where nobody else sees it."""
    root.mkdir()
    lower = ":".join(str(layer).replace("\\", "\\\\").replace(":", "\\:") for layer in layers)
    make = [
        mke2fs, "-q", "-F", "-t", "ext4", "-O", _FEATURES, "-b", "4096", "-U", identity, "-L", "root", "-d", str(root),
        "-E", f"offset={FIRST_SECTOR * SECTOR},root_owner=0:0,lazy_itable_init=1", str(disk), str(sectors * SECTOR // 4096),
    ]  # fmt: skip
    script = 'mount -t overlay -o "ro,lowerdir=$1" overlay "$2" && shift 2 && exec "$@"'
    call = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        script,
        "sh",
        lower,
        str(root),
        *make,
    ]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-500:]
        if "allocate" in said or "No space" in said or "ext2fs_write" in said:
            raise ImageError(
                f"the image does not fit a disk of {disk.stat().st_size >> 20:,} MiB: {said}",
                hint="give it a larger --size",
            )
        raise NodeError(f"cannot make the file system of a disk: {said}")

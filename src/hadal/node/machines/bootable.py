"""A disk that boots, made of an image that has a kernel, an init and systemd: what a container's image becomes a PC by.

The disk has a partition table of the old kind, GRUB before the only partition, and in that an ext4 with the files
of the image and our guest program as a service.
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

__all__ = ["find_tools", "make_bootable"]

_SECTOR = 512
_START = 2048
"""Sector of the partition; before it is room for GRUB."""
_LINUX = 0x83
_GRUB = Path("/usr/lib/grub/i386-pc")
_MODULES = ("biosdisk", "part_msdos", "ext2", "linux", "boot")
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
"""Of ext4: what GRUB 2.06 can read, whatever is the default here."""
_OPTIONS = "console=tty0 console=ttyS0 net.ifnames=0 mitigations=off"
_PROGRAM = "usr/lib/hadal/hadal-guest"
_UNIT = f"""\
[Unit]
Description=Guest program of hadal
DefaultDependencies=no
After=multi-user.target
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStartPre=-/usr/bin/udevadm settle --timeout=60
ExecStart=/{_PROGRAM} join
Restart=always
RestartSec=1
Delegate=yes
TasksMax=infinity
LimitNOFILE=1048576
OOMScoreAdjust=-1000
"""


def make_bootable(layers: tuple[Path, ...], path: Path, size_mb: int) -> None:
    """Write a disk with the files of an image.

    Args:
        layers: Directories of the image, the top one first.
        path: Of the disk, a new file.
        size_mb: MiB of it.

    Raises:
        UnsupportedError: This host has no GRUB, or no mke2fs.
        ImageError: The image has no kernel, or does not fit.
        NodeError: A tool fails.
    """
    mke2fs, mkimage = find_tools()
    kernel, initrd = _kernel_of(layers)
    identity = str(uuid.uuid4())
    with tempfile.TemporaryDirectory(prefix="hadal-disk-") as folder:
        work = Path(folder)
        _add_service(work / "added", identity)
        with path.open("xb") as disk:
            disk.truncate(size_mb << 20)
        _write_files(mke2fs, (work / "added", *layers), path, size_mb, identity, work / "root")
        _write_boot(mkimage, path, size_mb, _script(kernel, initrd, identity), work)


def find_tools() -> tuple[str, str]:
    """Return the programs that make such disks: mke2fs and grub-mkimage.

    Raises:
        UnsupportedError: One of them is not here, or GRUB for BIOS is not.
    """
    mke2fs, mkimage = shutil.which("mke2fs"), shutil.which("grub-mkimage")
    if mke2fs is None or mkimage is None or not _GRUB.is_dir():
        raise UnsupportedError(
            "no GRUB for BIOS, or no mke2fs, to make a disk with",
            hint="Debian: apt-get install grub-pc-bin e2fsprogs",
        )
    return mke2fs, mkimage


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


def _add_service(folder: Path, identity: str) -> None:
    """Make the layer above the image: as a layer, it follows no link of the image."""
    units = folder / "etc/systemd/system"
    wanted = units / "multi-user.target.wants"
    for directory in (wanted, (folder / _PROGRAM).parent):
        directory.mkdir(parents=True)
    for directory in folder.rglob("*"):
        directory.chmod(0o755)
    folder.chmod(0o755)
    shutil.copyfile(guest_program(), folder / _PROGRAM)
    (folder / _PROGRAM).chmod(0o755)
    (units / "hadal-guest.service").write_text(_UNIT, encoding="ascii")
    (wanted / "hadal-guest.service").symlink_to("../hadal-guest.service")
    fstab = f"UUID={identity} / ext4 errors=remount-ro,discard 0 1\n"
    (folder / "etc/fstab").write_text(fstab, encoding="ascii")


def _write_files(
    mke2fs: str, layers: tuple[Path, ...], disk: Path, size_mb: int, identity: str, root: Path
) -> None:
    """Make the file system, of all layers seen as one; they are mounted where nobody else sees it."""
    root.mkdir()
    lower = ":".join(str(layer).replace("\\", "\\\\").replace(":", "\\:") for layer in layers)
    blocks = ((size_mb << 20) - _START * _SECTOR) // 4096
    make = [
        mke2fs, "-q", "-F", "-t", "ext4", "-O", _FEATURES, "-b", "4096", "-U", identity, "-L", "root", "-d", str(root),
        "-E", f"offset={_START * _SECTOR},root_owner=0:0,lazy_itable_init=1", str(disk), str(blocks),
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
                f"the image does not fit a disk of {size_mb:,} MiB: {said}",
                hint="give it a larger --size",
            )
        raise NodeError(f"cannot make the file system of a disk: {said}")


def _script(kernel: str, initrd: str, identity: str) -> str:
    return f"set root=(hd0,msdos1)\nlinux {kernel} root=UUID={identity} ro {_OPTIONS}\ninitrd {initrd}\nboot\n"


def _write_boot(mkimage: str, disk: Path, size_mb: int, script: str, work: Path) -> None:
    """Put GRUB before the partition, and the table of partitions into the first sector."""
    (work / "grub.cfg").write_text(script, encoding="utf-8")
    core = work / "core.img"
    call = [
        mkimage, "-O", "i386-pc", "-d", str(_GRUB), "-p", "(hd0,msdos1)/boot/grub", "-c", str(work / "grub.cfg"),
        "-o", str(core), *_MODULES,
    ]  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodeError(f"grub-mkimage fails: {done.stderr.strip()[-500:]}")
    loader = bytearray(core.read_bytes())
    sectors = -(-len(loader) // _SECTOR)
    if sectors > _START - 1:
        raise NodeError(f"GRUB has {sectors} sectors, and there is room for {_START - 1}")
    # The first sector of GRUB ends with where the others are: start, number, segment of memory.
    struct.pack_into("<QHH", loader, _SECTOR - 12, 2, sectors - 1, 0x820)
    first = bytearray((_GRUB / "boot.img").read_bytes()[:_SECTOR])
    struct.pack_into("<Q", first, 0x5C, 1)  # where GRUB begins
    length = (size_mb << 20) // _SECTOR - _START
    entry = struct.pack("<B3sB3sII", 0x80, b"\0\2\0", _LINUX, b"\xfe\xff\xff", _START, length)
    first[446:510] = entry + bytes(48)
    first[510:512] = b"\x55\xaa"
    with disk.open("r+b") as file:
        file.write(bytes(first))
        file.seek(_SECTOR)
        file.write(bytes(loader))

"""What the probes try with file systems; see `attempts`."""

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from hadal.node.doctor import system_calls

__all__ = ["ATTEMPTS"]

_FIRST_ID = 1 << 20
_LOOP_GET_FREE, _LOOP_SET_FD, _LOOP_CLR_FD = 0x4C82, 0x4C00, 0x4C01
_PROJECTS, _GET_INFO = 2, 0x800005
_IMAGE_BYTES = 8 << 20
_INIT = 26


def _folders(at: str, *names: str) -> list[Path]:
    made = [Path(at) / name for name in names]
    for path in made:
        path.mkdir()
    return made


def idmap(at: str) -> str:
    """Map the ids of a mount of the folder."""
    (target,) = _folders(at, "mapped")
    system_calls.own_mounts()
    tree = system_calls.clone_mount(Path(at))
    system_calls.map_mount(tree, system_calls.new_user_namespace(_FIRST_ID))
    system_calls.attach_mount(tree, target)
    if target.stat().st_uid != _FIRST_ID:
        raise OSError("the mount does not show mapped ids")
    return "a mount shows its files under the ids of a box"


def overlay(at: str) -> str:
    """Mount an overlay and write through it."""
    lower, upper, work, merged = _folders(at, "lower", "upper", "work", "merged")
    (lower / "below").write_text("below")
    system_calls.own_mounts()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    system_calls.mount("overlay", merged, "overlay", options)
    (merged / "below").write_text("changed")
    if (lower / "below").read_text() != "below" or (upper / "below").read_text() != "changed":
        raise OSError("what is written does not go to the upper layer")
    return "changes go to a layer of their own"


def mapped_overlay(at: str) -> str:
    """The same with layers whose ids are mapped, as boxes have it."""
    lower, scratch, staged_lower, staged, merged = _folders(at, "l", "s", "ml", "ms", "merged")
    for name in ("upper", "work"):
        (scratch / name).mkdir()
    system_calls.own_mounts()
    users = system_calls.new_user_namespace(_FIRST_ID)
    for source, target in ((lower, staged_lower), (scratch, staged)):
        tree = system_calls.clone_mount(source)
        system_calls.map_mount(tree, users)
        system_calls.attach_mount(tree, target)
    options = f"lowerdir={staged_lower},upperdir={staged / 'upper'},workdir={staged / 'work'}"
    system_calls.act_on_files_as(_FIRST_ID)
    try:
        system_calls.mount("overlay", merged, "overlay", options)
        (merged / "file").write_text("x")
    finally:
        system_calls.act_on_files_as(0)
    if (scratch / "upper" / "file").stat().st_uid != 0:
        raise OSError("files do not belong to the box's own root")
    return "a box writes with its own ids"


def erofs(at: str, program: str) -> str:
    """Make an image and mount it from a file, without a loop device."""
    source, target = _folders(at, "source", "target")
    (source / "file").write_text("in an image")
    image = Path(at) / "image.erofs"
    made = subprocess.run([program, str(image), str(source)], capture_output=True, text=True)
    if made.returncode:
        raise OSError(f"mkfs.erofs: {made.stderr.strip()[-200:]}")
    system_calls.own_mounts()
    system_calls.mount(str(image), target, "erofs", flags=1)
    if (target / "file").read_text() != "in an image":
        raise OSError("its content is not what went in")
    return "an image file is mounted directly"


def fuse(at: str) -> str:
    """Mount a file system of our own and take the kernel's first request."""
    (target,) = _folders(at, "fuse")
    wire = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    system_calls.own_mounts()
    options = f"fd={wire},rootmode=40000,user_id=0,group_id=0"
    system_calls.mount("hadal", target, "fuse", options)
    request = os.read(wire, 1 << 17)
    operation = struct.unpack_from("I", request, 4)[0]
    major, minor = struct.unpack_from("II", request, 40)
    system_calls.umount(target)
    if operation != _INIT:
        raise OSError(f"the first request is {operation}, not INIT")
    return f"the kernel speaks version {major}.{minor}"


def _loop(image: Path) -> tuple[int, Path]:
    """Return a loop device of a file."""
    with Path("/dev/loop-control").open("rb") as control:
        for _ in range(8):  # somebody may take the same one first
            device = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}")
            descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                with image.open("r+b") as file:
                    fcntl.ioctl(descriptor, _LOOP_SET_FD, file.fileno())
                return descriptor, device
            except OSError as error:
                os.close(descriptor)
                if error.errno != errno.EBUSY:
                    raise
    raise OSError("no loop device is free")


def loop(at: str) -> str:
    """Read a file through a loop device."""
    image = Path(at) / "loop.image"
    image.write_bytes(b"hadal".ljust(1 << 20, b"\0"))
    descriptor, device = _loop(image)
    try:
        if os.read(descriptor, 5) != b"hadal":
            raise OSError("it does not show the file")
    finally:
        fcntl.ioctl(descriptor, _LOOP_CLR_FD)
    return f"{device} showed a file"


def quota_here(at: str) -> str:
    """Ask the file system of the folder for its project quotas."""
    device = _device_of(Path(at))
    information = ctypes.create_string_buffer(64)
    code = ctypes.c_int(_GET_INFO << 8 | _PROJECTS)
    if system_calls.libc.quotactl(code, device.encode(), 0, information):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"project quotas are on, on {device}"


def _device_of(path: Path) -> str:
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[2] == name:
            return fields[fields.index("-") + 2]
    raise OSError("no device")


def limited_disk(at: str, program: str) -> str:
    """Make a disk as a box has it, and fill it."""
    (target,) = _folders(at, "disk")
    image = Path(at) / "disk.image"
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    made = subprocess.run([program, "-q", "-F", str(image)], capture_output=True, text=True)
    if made.returncode:
        raise OSError(f"mkfs.ext4: {made.stderr.strip()[-200:]}")
    descriptor, device = _loop(image)
    try:
        system_calls.own_mounts()
        system_calls.mount(str(device), target, "ext4")
        try:
            (target / "file").write_bytes(bytes(2 * _IMAGE_BYTES))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            raise OSError("more was written than the disk holds")
        finally:
            system_calls.umount(target)
    finally:
        fcntl.ioctl(descriptor, _LOOP_CLR_FD)
    return "a disk in a file holds its size"


ATTEMPTS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        idmap,
        overlay,
        mapped_overlay,
        erofs,
        fuse,
        loop,
        quota_here,
        limited_disk,
    )
}

"""System calls that Python has no name for, for the probes only; an error names the step that failed."""

import ctypes
import os
import struct
from pathlib import Path

__all__ = [
    "CLONE",
    "act_on_files_as",
    "attach_mount",
    "clone_mount",
    "libc",
    "map_mount",
    "mount",
    "new_user_namespace",
    "own_mounts",
    "umount",
    "unshare",
]

CLONE = {
    "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
    "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _CLOEXEC = -100, 0x1000, 0o2000000
_MOUNT_ATTR_IDMAP, _MOVE_FROM_EMPTY, _DETACH = 0x100000, 4, 2
_CAPABILITY_VERSION = 0x20080522
_REC_PRIVATE = 1 << 14 | 1 << 18

libc = ctypes.CDLL(None, use_errno=True)


def _check(value: int, step: str) -> int:
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")
    return value


def unshare(*kinds: str) -> None:
    """Enter new namespaces."""
    flags = 0
    for kind in kinds:
        flags |= CLONE[kind]
    _check(libc.unshare(flags), f"unshare {' '.join(kinds)}")


def mount(source: str, target: Path, kind: str, options: str = "", flags: int = 0) -> None:
    """Mount a file system."""
    data = options.encode()
    value = libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data
    )
    _check(value, f"mount {kind}")


def umount(target: Path) -> None:
    """Take a mount away."""
    _check(libc.umount2(os.fsencode(target), _DETACH), "umount")


def own_mounts() -> None:
    """Enter a mount namespace from which nothing gets out."""
    unshare("mount")
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(_REC_PRIVATE), None), "private mounts")


def clone_mount(path: Path) -> int:
    """Return a detached mount of a directory."""
    flags = ctypes.c_uint(1 | _CLOEXEC)
    return _check(libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), "open_tree")


def map_mount(tree: int, user_namespace: int) -> None:
    """Map the ids of a detached mount by a user namespace."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    value = libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    _check(value, "map the ids of the mount")


def attach_mount(tree: int, target: Path) -> None:
    """Put a detached mount at a path."""
    value = libc.syscall(
        _MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_MOVE_FROM_EMPTY)
    )
    _check(value, "move_mount")


def act_on_files_as(number: int) -> None:
    """Make and change files as a user, with the capabilities that a change of user takes away."""
    libc.setfsgid(number)
    libc.setfsuid(number)
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    _check(libc.capget(header, data), "capget")
    (_, low, kept_low, _, high, kept_high) = struct.unpack("6I", data.raw)
    _check(
        libc.capset(header, struct.pack("6I", low, low, kept_low, high, high, kept_high)), "capset"
    )


def new_user_namespace(first: int, count: int = 65536) -> int:
    """Return a descriptor of a user namespace whose ids begin at `first` on this host."""
    told, ready = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        try:
            unshare("user")
            os.write(ready, b"y")
        except OSError:
            os.write(ready, b"n")
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    try:
        if os.read(told, 1) != b"y":
            raise OSError("a user namespace cannot be made")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text(f"0 {first} {count}", encoding="ascii")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go)
        os.waitpid(child, 0)

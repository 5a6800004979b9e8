"""The image `host`: this machine's own programs, with nothing of its data. Nothing is downloaded.

A small generated layer holds what a root file system needs around /usr; /usr itself is bound, read only.
From /etc come certificates, alternatives and the like, but no accounts, keys or names of this machine.
"""

import os
import stat
from pathlib import Path

from hadal.node.images.records import Bind

__all__ = ["make_skeleton"]

_USR_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_FOLDERS = {
    "dev": 0o755,
    "etc": 0o755,
    "etc/ssl": 0o755,
    "home": 0o755,
    "home/user": 0o755,
    "mnt": 0o755,
    "opt": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "srv": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "usr": 0o755,
    "var": 0o755,
    "var/cache": 0o755,
    "var/lib": 0o755,
    "var/log": 0o755,
    "var/tmp": 0o1777,
}
_COPIED = (
    "alternatives",  # /usr/bin/awk and /usr/bin/cc are links through it
    "ssl/certs",
    "ssl/openssl.cnf",
    "ca-certificates",
    "pki",
    "crypto-policies",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "protocols",
    "services",
)
_FILES = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        "user:x:1000:1000:user:/home/user:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    ),
    "etc/group": "root:x:0:\ntty:x:5:\nmail:x:8:\nstaff:x:50:\nuser:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
    "etc/shells": "/bin/sh\n",
}
_USER = 1000


def make_skeleton(target: Path) -> tuple[Bind, ...]:
    """Make the layer of `host` in a new directory; equal hosts give equal layers.

    Returns:
        What is to be bound into its boxes.

    Raises:
        OSError: It cannot be written.
    """
    target.mkdir()
    target.chmod(0o755)
    binds = [Bind(source="/usr", target="/usr")]
    for name, mode in _FOLDERS.items():
        (target / name).mkdir()
        (target / name).chmod(mode)
    os.chown(target / "home/user", _USER, _USER)
    for name in _USR_LINKS:
        path = Path("/", name)
        if path.is_symlink():
            (target / name).symlink_to(path.readlink())
        elif path.is_dir():  # a host that has not merged it into /usr
            (target / name).mkdir()
            (target / name).chmod(0o755)
            binds.append(Bind(source=str(path), target=str(path)))
    for name, text in _FILES.items():
        (target / name).write_text(text, encoding="utf-8")
        (target / name).chmod(0o644)
    for name in _COPIED:
        _copy(Path("/etc", name), target / "etc" / name)
    for folder, folders, files in os.walk(target, topdown=False):
        for path in (*folders, *files, "."):  # links to directories are among the folders
            os.utime(Path(folder, path), ns=(0, 0), follow_symlinks=False)
    return tuple(binds)


def _copy(source: Path, target: Path) -> None:
    """Copy what everybody may read: files, links, directories."""
    try:
        status = source.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_IROTH:
        target.mkdir()
        target.chmod(0o755)
        for name in sorted(path.name for path in source.iterdir()):
            _copy(source / name, target / name)
    elif stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH:
        target.write_bytes(source.read_bytes())
        target.chmod(0o644)

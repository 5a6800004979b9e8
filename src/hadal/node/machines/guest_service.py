"""How a system with systemd runs our guest program, and the disk by which one with cloud-init comes to it."""

import hashlib
import json
import os
from pathlib import Path

from hadal.node.guest_program import guest_program
from hadal.node.machines.fat import make_fat

__all__ = ["PROGRAM", "UNIT", "make_seed"]

PROGRAM = "usr/lib/hadal/hadal-guest"
UNIT = f"""\
[Unit]
Description=Guest program of hadal
DefaultDependencies=no
After=multi-user.target
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStartPre=-/usr/bin/udevadm settle --timeout=60
ExecStart=/{PROGRAM} join
Restart=always
RestartSec=1
Delegate=yes
TasksMax=infinity
LimitNOFILE=1048576
OOMScoreAdjust=-1000
"""
_LABEL = "cidata"
"""By which cloud-init's NoCloud source finds it."""
_INSTALL = f"""\
set -e
seed=$(mktemp -d)
mount -o ro -L {_LABEL} "$seed"
install -D -m 755 "$seed/guest" /{PROGRAM}
install -D -m 644 "$seed/unit" /etc/systemd/system/hadal-guest.service
umount "$seed"
rmdir "$seed"
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -sf ../hadal-guest.service /etc/systemd/system/multi-user.target.wants/hadal-guest.service
systemctl daemon-reload
systemctl start --no-block hadal-guest.service
"""


def make_seed(folder: Path) -> Path:
    """Return a disk for cloud-init that installs our guest program; made once for each version of it.

    Args:
        folder: Where such disks lie.

    Raises:
        UnsupportedError: This host lacks a tool for it.
        NodeError: It cannot be made.
        OSError: The disk is full.
    """
    config = {
        "runcmd": [_INSTALL],  # once, at the end of the first boot
        # The guest program tells it its name and its address, and its locale is its own.
        "preserve_hostname": True,
        "locale": False,
    }
    files = {
        "meta-data": b"instance-id: hadal\n",
        "network-config": b"version: 2\nethernets: {}\n",
        "user-data": b"#cloud-config\n" + json.dumps(config).encode(),
        "guest": guest_program().read_bytes(),
        "unit": UNIT.encode(),
    }
    name = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    path = folder / f"seed-{name}"  # part of a key
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.unlink(missing_ok=True)
        make_fat(part, 1 + (sum(map(len, files.values())) * 2 >> 20) + 1, _LABEL, files)
        part.chmod(0o644)
        part.replace(path)
    return path

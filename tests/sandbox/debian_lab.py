"""A Debian made by debootstrap, and the mirrors that this machine is configured for, for boxes to reach."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pip._internal.models.index import PyPI

from hadal.node.network.rules import PRIVATE
from hadal.sandbox import NetworkPolicy

__all__ = ["Mirrors", "debootstrap", "find_mirrors", "run_in_chroot"]

_SECONDS = 300


@dataclass(frozen=True)
class Mirrors:
    """Where packages come from.

    Attributes:
        debian: URL of the archive.
        suite: Of this machine.
        pip: Variables of a box for pip.
        certificates: File with those to trust, where the machine has one of its own.
        policy: What a box needs to reach both.
        debian_only: What it needs for packages of Debian alone.
    """

    debian: str
    suite: str
    pip: dict[str, str]
    certificates: Path | None
    policy: NetworkPolicy
    debian_only: NetworkPolicy


def find_mirrors():
    """Return what the configuration of this machine says; skip where boxes could not use it."""
    for name in ("apt-get", "debootstrap"):
        if shutil.which(name) is None:
            pytest.skip(f"there is no {name}: it belongs to Debian (apt-get install debootstrap)")
    proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy")]
    if proxies:
        pytest.skip(f"{proxies[0]} is set: this machine reaches its mirrors by a proxy")
    debian, suite = _archive()
    index = _pip_setting("index-url")
    certificates = os.environ.get("PIP_CERT") or _pip_setting("cert")
    hosts = [_host(index)] if index else [_host(PyPI.simple_url), (PyPI.file_storage_domain, 443)]
    return Mirrors(
        debian=debian,
        suite=suite,
        pip={"PIP_INDEX_URL": index} if index else {},
        certificates=Path(certificates) if certificates else None,
        policy=_policy([_host(debian), *hosts]),
        debian_only=_policy([_host(debian)]),
    )


def _archive():
    """Return URL and suite of this machine's own release, as apt knows them."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    text = Path("/etc/os-release").read_text()
    release = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    suite = release.get("VERSION_CODENAME", "").strip('"')
    for line in lines:
        url, _, of = line.partition(" ")
        if of == suite and url.startswith(("http://", "https://")):
            return url.rstrip("/"), suite
    pytest.skip(f"apt of this machine has no archive of {suite or 'its release'} over HTTP")


def _pip_setting(name):
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def _host(url):
    parts = urlsplit(url)
    return parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


def _policy(hosts):
    """Allow hosts by name, and by address those in private networks: a name alone does not lead there."""
    entries = set()
    for name, port in hosts:
        entries.add(f"{name}:{port}")
        try:
            found = {i[4][0] for i in socket.getaddrinfo(name, port, family=socket.AF_INET)}
        except OSError as error:
            pytest.skip(f"a mirror of this machine has no address: {name}: {error}")
        if any(IPv4Address(address).is_loopback for address in found):
            pytest.skip(f"the mirror {name} is on this machine's loopback, which no box can reach")
        entries |= {
            f"{a}:{port}" for a in found if any(IPv4Address(a) in private for private in PRIVATE)
        }
    return NetworkPolicy(allow=tuple(sorted(entries)))


def debootstrap(mirrors, folder):
    """Make a small Debian in a folder; skip where its packages cannot be had."""
    command = ["debootstrap", "--variant=minbase", mirrors.suite, str(folder), mirrors.debian]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip().splitlines()[-1:]
        pytest.skip(f"debootstrap: {' '.join(said) or result.returncode}")


def run_in_chroot(root, command, *, user="root", network=False):
    """Run a line of shell as root of the host does, in a chroot; all it mounts goes with it."""
    prepare = (
        f"mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev"
        f" && mount -t tmpfs tmpfs {root}/dev/shm && exec chroot --userspec={user} {root}"
        ' env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/tmp /bin/sh -c "$1"'
    )
    if not network:
        prepare = f"ip link set lo up && {prepare}"
    spaces = ["--mount", "--pid", "--fork", "--ipc", "--uts", *([] if network else ["--net"])]
    return subprocess.run(
        ["unshare", *spaces, "sh", "-c", prepare, "sh", command],
        capture_output=True,
        text=True,
        timeout=2 * _SECONDS,
        stdin=subprocess.DEVNULL,
    )

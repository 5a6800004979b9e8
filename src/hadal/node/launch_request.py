"""What the launcher is asked for, from the spec of a box."""

import os
from pathlib import Path

from hadal.errors import ConfigError
from hadal.node.cgroups import Cgroup
from hadal.node.launcher import LaunchRequest
from hadal.node.network import BoxNetwork
from hadal.sandbox.specs import FunctionSpec, Spec

__all__ = ["check_mounts", "launch_request"]


def check_mounts(spec: Spec) -> None:
    """Refuse mounts of what is not there.

    Raises:
        ConfigError: One of them is not on this node.
    """
    for mount in spec.mounts:
        if not os.path.lexists(mount.source):
            raise ConfigError(f"box spec: mounts: there is no {mount.source} on this node")


def launch_request(
    folder: Path, spec: Spec, *, layers: tuple[Path, ...], binds: tuple[tuple[Path, str, bool], ...],
    cgroup: Cgroup, network: BoxNetwork, uid_base: int, lease_s: int,
) -> LaunchRequest:  # fmt: skip
    """Return the request for a box, without its disk.

    Args:
        folder: Of the box, named as it is.
        spec: What was asked for.
        layers: Directories of its root, the top one first.
        binds: Of its image.
        cgroup: Its groups.
        network: Its network.
        uid_base: First id of its users on the host.
        lease_s: Seconds that it outlives the daemon.
    """
    own = tuple((Path(m.source), m.target, m.read_only) for m in spec.mounts)
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t{folder.name}\n"
    return LaunchRequest(
        hostname=folder.name,
        layers=layers,
        run_directory=folder / "mounts",
        socket=folder / "guest",
        uid_base=uid_base,
        cgroups=cgroup.procs,
        shm_bytes=spec.shm_mb << 20,
        etc={
            "hostname": f"{folder.name}\n".encode(),
            "hosts": hosts.encode(),
            "resolv.conf": network.resolv_conf,
        },
        network=network.path,
        binds=(*binds, *own),
        tmpfs=_function_scratch(spec) if isinstance(spec, FunctionSpec) else (),
        # Not 0: then a kernel that pipes dumps to a program would do so all the same.
        limits=("core=1:1", f"nofile=1024:{max(20_000, spec.nofile)}", "memlock=65536:65536"),
        read_only=spec.read_only or isinstance(spec, FunctionSpec),
        lease_s=lease_s,
    )


def _function_scratch(spec: FunctionSpec) -> tuple[tuple[str, int], ...]:
    """The only places where a call can write; they are emptied after it."""
    return tuple((path, spec.disk_mb << 20) for path in ("/tmp", "/var/tmp", "/home/call"))

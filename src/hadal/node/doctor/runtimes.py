"""Whether an OCI runtime of the system starts a container here."""

import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

from hadal.node.doctor.finding import Finding, run_tool

__all__ = ["probe_runtime"]

_LINKS = ("bin", "lib", "lib64")


def _bundle(folder: Path) -> None:
    """Write a container that has this machine's /usr and runs `true`."""
    root = folder / "rootfs"
    for name in ("usr", "proc"):
        (root / name).mkdir(parents=True)
    for name in _LINKS:
        if Path("/", name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    kinds = ("mount", "pid", "ipc", "uts", "network")
    config = {
        "ociVersion": "1.0.2",
        "process": {"args": ["/usr/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/usr", "source": "/usr", "options": ["bind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def probe_runtime(name: str) -> Finding:
    """Run a container by `crun` or `runc`; containers of hadal need neither."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        fix = f"apt-get install {name} (not needed: hadal has its own launcher)"
        return Finding(name, "limited", f"no {name}", fix)
    container = f"hadal-doctor-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="hadal-doctor-") as folder:
        bundle = Path(folder) / "bundle"
        _bundle(bundle)
        root = ("--root", str(Path(folder) / "state"))
        result = run_tool(path, *root, "run", "--bundle", str(bundle), container)
        run_tool(path, *root, "delete", "--force", container)
    version = run_tool(path, "--version").detail
    if not result.ok:
        fix = f"not needed: hadal has its own launcher ({platform.release()})"
        return Finding(name, "limited", f"{version} starts no container: {result.detail}", fix)
    return Finding(name, "ok", f"{version} ran a container")

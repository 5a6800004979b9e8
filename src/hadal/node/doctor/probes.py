"""The probes, each of which does what boxes need and says how it went. None leaves anything behind."""

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hadal.errors import UnsupportedError
from hadal.node.doctor.finding import Finding, attempt, run_tool
from hadal.node.doctor.runtimes import probe_runtime
from hadal.node.guest_program import guest_program
from hadal.node.machines.bootable import find_tools
from hadal.node.machines.kernel import find_kernel, kernel_folder
from hadal.node.machines.qemu import uefi_firmware

__all__ = ["probes"]

_NEEDED_CAPABILITIES = {
    0: "CHOWN", 1: "DAC_OVERRIDE", 3: "FOWNER", 5: "KILL", 6: "SETGID", 7: "SETUID", 12: "NET_ADMIN",
    18: "SYS_CHROOT", 19: "SYS_PTRACE", 21: "SYS_ADMIN", 27: "MKNOD",
}  # fmt: skip
_MANY_BOXES = 2000
_FILES, _PIDS = 4 * _MANY_BOXES, 16 * _MANY_BOXES
_WATCHERS = _MANY_BOXES


def probe_guest_program() -> Finding:
    """Whether the program that is the init of every box is there and runs."""
    try:
        path = guest_program()
    except UnsupportedError as error:
        return Finding("guest program", "missing", error.message, error.hint or "")
    said = run_tool(str(path), "version")
    if not said.ok:
        fix = f"it was built for another machine than {platform.machine()}: install hadal again"
        return Finding("guest program", "missing", said.detail, fix)
    return Finding("guest program", "ok", said.detail)


def probe_privileges() -> Finding:
    """Whether this process may make boxes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    lacking = [name for bit, name in _NEEDED_CAPABILITIES.items() if not effective >> bit & 1]
    if os.geteuid() or lacking:
        what = f"uid {os.geteuid()}" + (
            f", without CAP_{', CAP_'.join(lacking)}" if lacking else ""
        )
        return Finding("privileges", "missing", what, "run the node as root: sudo hadal node serve")
    if not effective >> 24 & 1:
        return Finding(
            "privileges", "ok", "root; without CAP_SYS_RESOURCE, which only raises hard limits"
        )
    return Finding("privileges", "ok", "root")


def _tried(name: str, what: str, fix: str, *arguments: str, needed: bool = True) -> Finding:
    """Return how an attempt went, as a finding."""
    result = attempt(what, *arguments)
    if result.ok:
        return Finding(name, "ok", result.detail)
    return Finding(name, "missing" if needed else "limited", result.detail, fix)


def _in_folder(
    at: Path, name: str, what: str, fix: str, *arguments: str, needed: bool = True
) -> Finding:
    with tempfile.TemporaryDirectory(prefix=".hadal-doctor-", dir=at) as folder:
        return _tried(name, what, fix, folder, *arguments, needed=needed)


def _with_tool(
    tool: str, package: str, name: str, probe: Callable[[str], Finding]
) -> Callable[[], Finding]:
    def found() -> Finding:
        path = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            return Finding(name, "limited", f"no {tool}", f"apt-get install {package}")
        return probe(path)

    return found


def probe_disk_limits(at: Path) -> Finding:
    """Whether what a box may write can be limited: each has a disk in a file, as large as it may be."""
    program = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return Finding("disk limits", "missing", "no mkfs.ext4", "apt-get install e2fsprogs")
    with tempfile.TemporaryDirectory(prefix=".hadal-doctor-", dir=at) as folder:
        disk = attempt("limited_disk", folder, program)
        quota = attempt("quota_here", folder)
    if not disk.ok:
        fix = "modprobe loop; a kernel with CONFIG_EXT4_FS"
        return Finding("disk limits", "missing", disk.detail, fix)
    note = quota.detail if quota.ok else "project quotas are off, and not needed"
    return Finding("disk limits", "ok", f"{disk.detail}; {note}")


def probe_kvm() -> Finding:
    """Whether KVM runs a guest."""
    if platform.machine() != "x86_64":
        return Finding("KVM", "limited", f"not probed on {platform.machine()}")
    if not Path("/dev/kvm").exists():
        fix = "a machine with virtualisation, or a cloud instance with nested virtualisation"
        return Finding("KVM", "limited", "no /dev/kvm", fix)
    fix = "a host that is no virtual machine, or one with full nested virtualisation"
    return _tried("KVM", "kvm", fix, needed=False)


def probe_box(at: Path) -> Finding:
    """Whether a whole box can be made, used and ended."""
    # A short path: a Unix socket lies in it.
    with tempfile.TemporaryDirectory(prefix=".hd-", dir=at) as folder:
        return _tried("a whole box", "box", "see what is missing above", folder)


def _sysctl(name: str) -> int | None:
    try:
        text = Path("/proc/sys", name.replace(".", "/")).read_text(encoding="ascii")
    except OSError:
        return None
    return int(text.split()[0])


def probe_number(name: str, sysctl: str, needed: int, what: str) -> Finding:
    """Whether a limit of the kernel is high enough for many boxes."""
    value = _sysctl(sysctl)
    if value is None:
        return Finding(name, "limited", f"this kernel has no {sysctl}")
    detail = f"{sysctl} = {value:,}; {what}"
    if value < needed:
        return Finding(name, "limited", detail, f"sysctl -w {sysctl}={max(needed, 2 * value)}")
    return Finding(name, "ok", detail)


def probe_open_files() -> Finding:
    """Whether the daemon may have enough files open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    detail = f"at most {hard:,}; {_MANY_BOXES:,} boxes take up to {_FILES:,}"
    if hard < _FILES:
        return Finding("open files", "limited", detail, "ulimit -Hn 1048576 before the node starts")
    return Finding("open files", "ok", detail)


def probes(at: Path) -> list[Callable[[], Finding]]:
    """Return the probes, in the order of the report.

    Args:
        at: An existing folder on the file system where boxes would be.
    """
    kernel = "a kernel of 6.3 or later"
    erofs = partial(_in_folder, at, "EROFS", "erofs", "a kernel with CONFIG_EROFS_FS")
    return [
        probe_guest_program,
        probe_privileges,
        partial(_tried, "namespaces", "namespaces", "sysctl -w user.max_user_namespaces=100000"),
        partial(_in_folder, at, "id-mapped mounts", "idmap", f"{kernel}, and ext4, xfs or btrfs"),
        partial(_in_folder, at, "overlayfs", "overlay", f"{kernel} with CONFIG_OVERLAY_FS"),
        partial(_in_folder, at, "overlay with mapped ids", "mapped_overlay", kernel),
        partial(_tried, "seccomp", "seccomp", "a kernel with CONFIG_SECCOMP_FILTER"),
        partial(
            _tried, "control groups", "limits", "mount cgroup2 at /sys/fs/cgroup, or delegate it",
            f"doctor-{os.getpid()}",
        ),
        partial(probe_box, at),
        _with_tool("mkfs.erofs", "erofs-utils", "EROFS", lambda path: erofs(path, needed=False)),
        partial(probe_disk_limits, at),
        partial(
            _in_folder, at, "loop devices", "loop", "modprobe loop"
        ),
        partial(_in_folder, at, "FUSE", "fuse", "modprobe fuse", needed=False),
        partial(_tried, "networks", "networks", "apt-get install nftables", needed=False),
        partial(probe_runtime, "crun"),
        partial(probe_runtime, "runc"),
        probe_kvm,
        _with_tool("qemu-system-x86_64", "qemu-system-x86", "QEMU", _version_of("QEMU")),
        partial(probe_machine_kernel, at),
        partial(_found, "disks that boot", lambda: ", ".join(find_tools())),
        partial(_found, "UEFI", uefi_firmware),
        _firecracker,
        probe_open_files,
        partial(
            probe_number, "processes", "kernel.pid_max", _PIDS + 4096,
            f"{_MANY_BOXES:,} boxes with 16 processes each need {_PIDS:,}",
        ),
        partial(
            probe_number, "inotify", "fs.inotify.max_user_instances", _WATCHERS,
            "all boxes together count as one user",
        ),
    ]  # fmt: skip


def _version_of(name: str) -> Callable[[str], Finding]:
    def found(path: str) -> Finding:
        said = run_tool(path, "--version")
        state = "ok" if said.ok else "limited"
        return Finding(name, state, said.detail, "" if said.ok else f"install {name} again")

    return found


def probe_machine_kernel(at: Path) -> Finding:
    """Whether there is a kernel that virtual machines boot, and QEMU's tool for their disks."""
    name = "machine kernel"
    if shutil.which("qemu-img") is None:
        return Finding(name, "limited", "no qemu-img for disks", "apt-get install qemu-utils")
    try:
        kernel = find_kernel(kernel_folder(at))
        kernel.needed_modules()
    except UnsupportedError as error:
        return Finding(name, "limited", error.message, error.hint or "")
    return Finding(name, "ok", str(kernel.image))


def _found(name: str, find: Callable[[], str]) -> Finding:
    """Return whether what some machines need is there."""
    try:
        return Finding(name, "ok", find())
    except UnsupportedError as error:
        return Finding(name, "limited", error.message, error.hint or "")


def _firecracker() -> Finding:
    path = shutil.which("firecracker")
    if path is None:
        fix = "no Debian package: github.com/firecracker-microvm/firecracker/releases"
        return Finding("Firecracker", "limited", "no firecracker", fix)
    return _version_of("Firecracker")(path)

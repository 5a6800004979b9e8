"""Kernels that machines boot, and the modules that go with them."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import ConfigError, UnsupportedError

__all__ = ["Kernel", "fetch_kernel", "find_kernel", "install_kernel", "kernel_folder"]

_NEWEST = "linux-image-cloud-amd64"
"""The package that depends on Debian's newest kernel for virtual machines."""

_MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "virtio-rng", "virtio_balloon", "crc32c_generic", "erofs", "overlay")  # fmt: skip
"""What a box needs of its kernel, in modules where it is not in the kernel itself."""
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def kernel_folder(state: Path) -> Path:
    """Return where a node has a kernel of its own, below its state folder."""
    return state / "machines" / "kernel"


@dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
        image: As its boot loader takes it, `vmlinuz`.
        modules: Folder with its modules, `/lib/modules/VERSION`; None where all are built in.
    """

    image: Path
    modules: Path | None

    def needed_modules(self, more: Sequence[str] = ()) -> list[Path]:
        """Return the modules of a box, each after those that it needs.

        Args:
            more: Names of others beside those that every machine needs.

        Raises:
            UnsupportedError: One of them is neither a file nor built in.
        """
        if self.modules is None:
            return []
        files = {_name(path.stem): path for path in self.modules.rglob("*.ko")}
        builtin = self._builtin()
        found: dict[str, Path] = {}

        def add(name: str) -> None:
            name = _name(name)
            if name in found or name in builtin:
                return
            if name not in files:
                raise UnsupportedError(
                    f"the kernel {self.image} has no module {name} in {self.modules}",
                    hint="Debian's linux-image-cloud-amd64 has all; compressed modules are not read",
                )
            for other in _depends(files[name]):
                add(other)
            found[name] = files[name]

        for name in (*_MODULES, *more):
            add(name)
        return list(found.values())

    def _builtin(self) -> set[str]:
        assert self.modules is not None
        text = (self.modules / "modules.builtin").read_text(encoding="utf-8")
        return {_name(Path(line).stem) for line in text.splitlines()}


def _name(module: str) -> str:
    return module.replace("-", "_")


def _depends(module: Path) -> list[str]:
    found = _DEPENDS.search(module.read_bytes())
    return [name.decode("ascii") for name in found[1].split(b",") if name] if found else []


def _kernels(root: Path) -> list[Kernel]:
    """Return the kernels that are installed below a root directory, the newest first."""
    images = sorted(
        (root / "boot").glob("vmlinuz-*"), key=lambda p: p.stat().st_mtime, reverse=True
    )
    versions = [image.name.removeprefix("vmlinuz-") for image in images]
    return [
        Kernel(image, root / "lib/modules" / version)
        for image, version in zip(images, versions, strict=True)
        if (root / "lib/modules" / version / "modules.builtin").exists()
    ]


def find_kernel(folder: Path) -> Kernel:
    """Return the kernel of this node: one that was put into its folder, or one of the host's.

    Args:
        folder: With `boot/` and `lib/modules/`, as a package of a kernel has them.

    Raises:
        UnsupportedError: There is none.
    """
    roots = [*map(Path, filter(None, [os.environ.get("HADAL_KERNEL")])), folder, Path("/")]
    for root in roots:
        for kernel in _kernels(root):
            return kernel
    raise UnsupportedError(
        f"no kernel for virtual machines in {' or '.join(map(str, roots))}",
        hint="`hadal node kernel` fetches that of Debian's linux-image-cloud-amd64, or takes one out of a"
        " package of yours; or set HADAL_KERNEL to a folder with boot/ and lib/modules/",
    )


def install_kernel(package: Path, folder: Path) -> Kernel:
    """Take a kernel and its modules out of a Debian package, and make it that of a node.

    Args:
        package: A file `linux-image-*.deb`.
        folder: Of the node, as `find_kernel`; what it had is replaced.

    Raises:
        ConfigError: The package cannot be read, or has no kernel.
        UnsupportedError: `dpkg-deb` is not here, or the kernel lacks what boxes need.
    """
    tool = shutil.which("dpkg-deb")
    if tool is None:
        raise UnsupportedError("no dpkg-deb to read a package with", hint="Debian: package dpkg")
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        done = subprocess.run(
            [tool, "-x", package, part], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConfigError(f"cannot read the package {package}: {done.stderr.strip()[:500]}")
        found = _kernels(part)
        if not found:
            raise ConfigError(
                f"no kernel with modules in {package}",
                hint="a package like Debian's linux-image-6.1.0-*-cloud-amd64 has boot/vmlinuz-* and"
                " lib/modules; linux-image-cloud-amd64 itself only names the newest of them",
            )
        found[0].needed_modules()
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return _kernels(folder)[0]


def fetch_kernel(folder: Path) -> Path:
    """Fetch the package of Debian's newest kernel for virtual machines, and return its file.

    Args:
        folder: Where it is put.

    Raises:
        UnsupportedError: This host has no apt, or its apt does not know such a package.
        ConfigError: It cannot be fetched.
    """
    said = _apt(["apt-cache", "depends", "--important", _NEWEST], folder)
    found = re.search(r"Depends: (linux-image-\S+)", said)
    if found is None:
        raise UnsupportedError(
            f"apt does not know {_NEWEST}: {said.strip()[:500] or 'no answer'}",
            hint="`apt-get update` first; elsewhere give the file of a package",
        )
    _apt(["apt-get", "download", "-q", found[1]], folder)
    packages = list(folder.glob("*.deb"))
    if not packages:
        raise ConfigError(f"apt-get has fetched no {found[1]}")
    return packages[0]


def _apt(call: list[str], folder: Path) -> str:
    """Run a command of apt in a folder and return what it says."""
    try:
        done = subprocess.run(
            call, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )  # fmt: skip
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"no {call[0]} to fetch a kernel with",
            hint="give the file of a package such as Debian's linux-image-6.1.0-*-cloud-amd64",
        ) from error
    if done.returncode:
        raise ConfigError(
            f"`{' '.join(call)}` failed: {(done.stderr or done.stdout).strip()[-500:]}",
            hint="`apt-get update`, or give the file of a package",
        )
    return done.stdout

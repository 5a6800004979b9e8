"""The initial RAM disk of machines: the guest program and modules of the kernel, in the newc format of cpio."""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["make_initramfs"]

_SIGNED = b"~Module signature appended~\n"
_SIGNATURE_BYTES = 12
"""Of struct module_signature, which ends with the size of what is before it."""


def _entry(number: int, name: str, mode: int, content: bytes = b"") -> bytes:
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _archive(folders: Sequence[str], files: Mapping[str, bytes]) -> bytes:
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    return b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1))


def _unsigned(module: bytes) -> bytes:
    """Return a module without its signature: an emulated processor takes 20 ms to look at each.

    Where it comes from is known: the node has taken it out of the kernel's own package.
    """
    if not module.endswith(_SIGNED):
        return module
    size = int.from_bytes(module[-len(_SIGNED) - 4 : -len(_SIGNED)], "big")
    return module[: -len(_SIGNED) - _SIGNATURE_BYTES - size]


def make_initramfs(program: Path, modules: Sequence[Path]) -> bytes:
    """Return it.

    Args:
        program: The guest program.
        modules: Of the kernel, in the order in which they are loaded.
    """
    files = {"init": program.read_bytes()}
    files |= {f"modules/{path.name}": _unsigned(path.read_bytes()) for path in modules}
    files["modules/order"] = "".join(f"{path.name}\n" for path in modules).encode()
    return _archive(["modules"], files)

"""The initial RAM disk of machines: the guest program and modules of the kernel, in the newc format of cpio."""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["make_initramfs"]


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


def make_initramfs(program: Path, modules: Sequence[Path]) -> bytes:
    """Return it.

    Args:
        program: The guest program.
        modules: Of the kernel, in the order in which they are loaded.
    """
    files = {"init": program.read_bytes()}
    files |= {f"modules/{path.name}": path.read_bytes() for path in modules}
    files["modules/order"] = "".join(f"{path.name}\n" for path in modules).encode()
    return _archive(["modules"], files)

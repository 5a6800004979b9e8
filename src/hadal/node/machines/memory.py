"""The memory of machines: a file in memory that many map privately, so that they share what none has changed."""

import fcntl
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from hadal.errors import NodeError

__all__ = ["NAME", "data_of", "dump_memory", "empty_memory", "load_memory"]

NAME = "hadal-machine"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) .*/memfd:" + NAME)
_PART = 1 << 20
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def empty_memory(size: int) -> int:
    """Return the descriptor of memory without anything in it, for one machine to write."""
    memory = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size)
        os.fchmod(memory, 0o666)
        return memory
    except BaseException:
        os.close(memory)
        raise


def load_memory(path: Path) -> int:
    """Return the descriptor of memory with the content of a file.

    Raises:
        OSError: It cannot be read, or there is too little memory.
    """
    memory = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with path.open("rb") as file:
            os.ftruncate(memory, os.fstat(file.fileno()).st_size)
            _copy(file.fileno(), memory)
        return _sealed(memory)
    except BaseException:
        os.close(memory)
        raise


def _sealed(memory: int) -> int:
    """QEMU opens it for writing, even to map it privately; nobody writes it, whatever becomes of QEMU."""
    os.fchmod(memory, 0o666)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    return memory


def data_of(file: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of every part of a file that is no hole."""
    at, size = 0, os.fstat(file).st_size
    while at < size:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # no more data
            return
        at = os.lseek(file, start, os.SEEK_HOLE)
        yield start, at - start


def _copy(source: int, target: int) -> None:
    for start, length in data_of(source):
        for at in range(start, start + length, _PART):
            os.pwrite(target, os.pread(source, min(_PART, start + length - at), at), at)


def dump_memory(pid: int, base: int, target: Path) -> None:
    """Write the memory of a machine that stands still into a new file.

    Args:
        pid: Of QEMU.
        base: The memory that it was started with: which it writes itself, or has a private copy of.
        target: Of the file.

    Raises:
        NodeError: The process has not got it.
        OSError: It cannot be read or written.
    """
    with target.open("xb") as file:
        os.ftruncate(file.fileno(), os.fstat(base).st_size)
        _copy(base, file.fileno())
        mappings = _mappings(pid)
        if not mappings:
            raise NodeError(f"process {pid} has no memory of a machine")
        with (
            open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,  # noqa: PTH123
            open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages,  # noqa: PTH123
        ):
            for start, end, offset in mappings:
                for first, last in _changed(pages.fileno(), start, end):
                    data = os.pread(memory.fileno(), last - first, first)
                    os.pwrite(file.fileno(), data, offset + first - start)
        os.fsync(file.fileno())


def _mappings(pid: int) -> list[tuple[int, int, int]]:
    """Return start, end and offset in the memory of each mapping of it."""
    text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    return [(int(a, 16), int(b, 16), int(c, 16)) for a, b, c in _MAPPING.findall(text)]


def _changed(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield first and last address of every run of pages that are the process's own, at most 1 MiB."""
    entries = array("Q", os.pread(pagemap, (end - start) // _PAGE * 8, start // _PAGE * 8))
    run: int | None = None
    for index, entry in enumerate(entries):
        address = start + index * _PAGE
        own = entry & _SWAPPED or (entry & _PRESENT and not entry & _OF_FILE)
        if run is not None and (not own or address - run >= _PART):
            yield run, address
            run = None
        if own and run is None:
            run = address
    if run is not None:
        yield run, end

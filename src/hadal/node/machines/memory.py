"""The memory of machines: a file in memory that many map privately, so that they share what none has changed."""

import fcntl
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from hadal.errors import NodeError
from hadal.node.sparse import copy_data, copy_not_zero, put_not_zero

__all__ = [
    "DESCRIPTOR",
    "NAME",
    "copy_memory",
    "empty_memory",
    "load_memory",
    "memory_from",
    "memory_of",
    "save_memory",
]

NAME = "hadal-machine"
DESCRIPTOR = 4
"""Number of its memory in QEMU."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) .*/memfd:" + NAME)
_PART = 1 << 20
_MAPPINGS_MAX = 64
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def empty_memory(size: int) -> int:
    """Return the descriptor of memory without anything in it, for one machine to write."""
    memory = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, size)
        os.fchmod(memory, 0o666)
        return memory
    except BaseException:
        os.close(memory)
        raise


def load_memory(path: Path, *, sealed: bool = True) -> int:
    """Return the descriptor of memory with the content of a file, which nobody can change where it is sealed.

    Raises:
        OSError: It cannot be read, or there is too little memory.
    """
    with path.open("rb") as file:
        return memory_from(file.fileno(), os.fstat(file.fileno()).st_size, sealed=sealed)


def memory_from(file: int, size: int, *, sealed: bool = True) -> int:
    """Return the descriptor of memory with the content of an open file.

    Args:
        file: A descriptor of it.
        size: Bytes that it has.
        sealed: Whether nobody can change it.

    Raises:
        NodeError: It has another size.
        OSError: It cannot be read, or there is too little memory.
    """
    if (found := os.fstat(file).st_size) != size:
        raise NodeError(f"the memory of a machine has {found} bytes, expected {size}")
    memory = empty_memory(size)
    try:
        copy_data(file, memory)
        return _sealed(memory) if sealed else memory
    except BaseException:
        os.close(memory)
        raise


def copy_memory(pid: int, base: int) -> int:
    """Return the descriptor of a copy of the memory of a machine that stands still, which nobody can change.

    Args:
        pid: Of QEMU.
        base: The memory that it was started with: which it writes itself, or has a private copy of.

    Raises:
        NodeError: The process has not got it.
        OSError: It cannot be read, or there is too little memory.
    """
    mappings = _mappings_within(pid, os.fstat(base).st_size)
    copy = empty_memory(os.fstat(base).st_size)
    try:
        copy_data(base, copy)
        for at, data in _own(pid, mappings):
            os.pwrite(copy, data, at)
        return _sealed(copy)
    except BaseException:
        os.close(copy)
        raise


def save_memory(pid: int, base: int, target: int) -> None:
    """Write the memory of a machine that stands still into an empty file; what is zero becomes a hole.

    Args:
        pid: Of QEMU.
        base: As for `copy_memory`.
        target: Descriptor of the file, to be written and read.

    Raises:
        NodeError: The process has not got it.
        OSError: It cannot be read, or the disk is full.
    """
    mappings = _mappings_within(pid, os.fstat(base).st_size)
    copy_not_zero(base, target)
    for at, data in _own(pid, mappings):
        put_not_zero(target, at, data)


def _mappings_within(pid: int, size: int) -> list[tuple[int, int, int]]:
    mappings = _mappings(pid)
    # What broke out of its machine may map it as it likes.
    within = all(offset + end - start <= size for start, end, offset in mappings)
    if not within or not 0 < len(mappings) <= _MAPPINGS_MAX:
        raise NodeError(f"process {pid} has not mapped the memory of a machine as QEMU does")
    return mappings


def _own(pid: int, mappings: list[tuple[int, int, int]]) -> Iterator[tuple[int, bytes]]:
    """Yield place and content of the pages that are the process's own."""
    with (
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,  # noqa: PTH123
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages,  # noqa: PTH123
    ):
        for start, end, offset in mappings:
            for first, last in _changed(pages.fileno(), start, end):
                yield offset + first - start, os.pread(memory.fileno(), last - first, first)


def _sealed(memory: int) -> int:
    """QEMU opens it for writing, even to map it privately; nobody writes it, whatever becomes of QEMU."""
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    return memory


def memory_of(pid: int) -> int:
    """Return a descriptor of the memory that a machine was started with.

    Args:
        pid: Of QEMU.

    Raises:
        NodeError: It has none: it has ended, or does not do what QEMU does.
    """
    try:
        memory = os.open(f"/proc/{pid}/fd/{DESCRIPTOR}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NodeError(f"process {pid} has no memory of a machine: {error.strerror}") from error
    try:
        fcntl.fcntl(memory, fcntl.F_GET_SEALS)  # what is no file in memory has none
    except OSError as error:
        os.close(memory)
        raise NodeError(f"process {pid} has something else where its memory was") from error
    return memory


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

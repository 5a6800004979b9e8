"""The journal of a run: one JSON object a line, written as things happen, before anybody acts on them.

A line that was not finished when the process died is dropped when the file is opened again.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hadal.errors import ConfigError, StorageError

__all__ = ["Journal", "locked_inodes", "read_events"]


class Journal:
    """An open journal; nobody else can open it meanwhile.

    Args:
        path: Of the file; made if it is not there.

    Attributes:
        events: What it had when it was opened.

    Raises:
        ConfigError: Another process runs it.
        StorageError: It cannot be read or written, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot open the journal {path}: {error.strerror}") from error
        try:
            self.events = self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def _recover(self) -> list[dict[str, Any]]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process runs {self.path}", hint="wait for it, or end it"
            ) from None
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        return _parse(self.path, data[:whole])

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Write an event and return it.

        Raises:
            StorageError: It cannot be written; the file is as it was before.
        """
        event = {"kind": kind, "at": time.time_ns(), **fields}
        data = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            os.ftruncate(self._file, before)
            raise StorageError(
                f"cannot write to the journal {self.path}: {error.strerror}",
                hint="free space on the disk",
            ) from error
        return event

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def locked_inodes() -> set[int]:
    """Return the inodes of files that some process has locked, as it does a journal that it has open.

    The kernel's list of locks is read, since trying a lock would be in the way of who opens the file just then.
    """
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split()[-3].rpartition(":")[2]) for line in locks if " FLOCK " in line}


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a journal, whoever has it open; a line that is being written is left out.

    Raises:
        StorageError: It cannot be read, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the journal {path}: {error.strerror}") from error
    return _parse(path, data[: data.rfind(b"\n") + 1])


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            event: Any = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "kind" not in event:
            raise StorageError(
                f"the journal {path} is damaged at line {number}: {line[:80]!r}",
                hint="remove that line and what follows to go on from there",
            )
        events.append(event)
    return events

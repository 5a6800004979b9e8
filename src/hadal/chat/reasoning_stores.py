"""Where `ReasoningMemory` keeps reasoning: in this process, or in a SQLite file.

A store knows nothing of messages. It maps slots to texts, within bounds on entries and bytes, and
evicts what was used least recently. One rule is its own, because it has to hold when several
processes write at once: a slot that was given two different texts holds none.
"""

import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from hadal.errors import InputError, StorageError

__all__ = ["InMemoryStore", "ReasoningStore", "SQLiteStore"]

_SCHEMA_VERSION: Final = 1
_APPLICATION_ID: Final = 0x6861646C  # marks the file as ours: "hadl"
_SLOT_BYTES: Final = 64
"""Length of a slot, counted with each entry so that empty reasoning is not free."""

_SCHEMA: Final = f"""
CREATE TABLE entry (
    slot TEXT PRIMARY KEY,
    reasoning BLOB,  -- NULL: two turns differ only in this, so neither is told
    size INTEGER NOT NULL,
    used INTEGER NOT NULL
);
CREATE INDEX entry_used ON entry (used, slot, size);
CREATE TABLE total (entries INTEGER NOT NULL, size INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0);
CREATE TRIGGER entry_added AFTER INSERT ON entry BEGIN
    UPDATE total SET entries = entries + 1, size = size + NEW.size;
END;
CREATE TRIGGER entry_changed AFTER UPDATE OF size ON entry BEGIN
    UPDATE total SET size = size + NEW.size - OLD.size;
END;
CREATE TRIGGER entry_removed AFTER DELETE ON entry BEGIN
    UPDATE total SET entries = entries - 1, size = size - OLD.size;
END;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
"""


class ReasoningStore(Protocol):
    """Keeps reasoning under slots, which are opaque texts of 64 characters."""

    def save(self, slots: Sequence[str], reasoning: str) -> None:
        """Put reasoning into slots; a slot that holds another one is spoilt until evicted.

        Reasoning that would not fit alone is not kept either.

        Raises:
            StorageError: The store cannot be written.
        """
        ...

    def load(self, slots: Sequence[str]) -> dict[str, str]:
        """Reasoning of those slots that hold one; counts as use.

        Raises:
            StorageError: The store cannot be read.
        """
        ...

    def close(self) -> None:
        """Give up what the store holds open."""
        ...


class InMemoryStore:
    """Keeps reasoning in this process; safe for several threads.

    Args:
        max_entries: Slots kept at most.
        max_bytes: UTF-8 bytes of reasoning kept at most, 64 more for each entry.
    """

    def __init__(self, *, max_entries: int = 20_000, max_bytes: int = 256 << 20) -> None:
        _check_bounds(max_entries, max_bytes)
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[str, bytes | None] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def save(self, slots: Sequence[str], reasoning: str) -> None:
        """See `ReasoningStore`."""
        blob = _to_bytes(reasoning)
        with self._lock:
            for slot in slots:
                same = slot not in self._entries or self._entries[slot] == blob
                fits = _size_of(blob) <= self._max_bytes
                self._put(slot, blob if same and fits else None)
            while len(self._entries) > self._max_entries or self._size > self._max_bytes:
                self._size -= _size_of(self._entries.popitem(last=False)[1])

    def _put(self, slot: str, blob: bytes | None) -> None:
        if slot in self._entries:
            self._size -= _size_of(self._entries.pop(slot))
        self._entries[slot] = blob
        self._size += _size_of(blob)

    def load(self, slots: Sequence[str]) -> dict[str, str]:
        """See `ReasoningStore`."""
        found: dict[str, str] = {}
        with self._lock:
            for slot in slots:
                if slot in self._entries:
                    self._entries.move_to_end(slot)
                    blob = self._entries[slot]
                    if blob is not None:
                        found[slot] = _to_text(blob)
        return found

    def close(self) -> None:
        """See `ReasoningStore`."""


class SQLiteStore:
    """Keeps reasoning in a file; safe for several threads and processes, and for kill -9.

    A process that was forked opens a connection of its own. A new file is readable for its owner
    only, since what the model thought tells what users asked.

    Args:
        path: The file; made if there is none. Its folder must exist.
        max_entries: Slots kept at most.
        max_bytes: UTF-8 bytes of reasoning kept at most, 64 more for each entry.
        timeout_s: How long to wait for another process that is writing.

    Raises:
        StorageError: The file cannot be opened or is not such a store.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_entries: int = 200_000,
        max_bytes: int = 2 << 30,
        timeout_s: float = 10.0,
    ) -> None:
        _check_bounds(max_entries, max_bytes)
        self._path = Path(path)
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._timeout_s = timeout_s
        self._forked: list[sqlite3.Connection] = []
        self._open()

    def save(self, slots: Sequence[str], reasoning: str) -> None:
        """See `ReasoningStore`."""
        blob = _to_bytes(reasoning)
        with self._transaction() as db:
            used = _next_use(db)
            for slot in slots:
                row = db.execute("SELECT reasoning FROM entry WHERE slot = ?", (slot,)).fetchone()
                fits = _size_of(blob) <= self._max_bytes
                kept = blob if fits and (row is None or row[0] == blob) else None
                db.execute(
                    "INSERT INTO entry (slot, reasoning, size, used) VALUES (?1, ?2, ?3, ?4) "
                    "ON CONFLICT (slot) DO UPDATE SET reasoning = ?2, size = ?3, used = ?4",
                    (slot, kept, _size_of(kept), used),
                )
            self._evict(db)

    def _evict(self, db: sqlite3.Connection) -> None:
        entries, size = db.execute("SELECT entries, size FROM total").fetchone()
        while entries > self._max_entries or size > self._max_bytes:
            slot, freed = db.execute(
                "SELECT slot, size FROM entry ORDER BY used, slot LIMIT 1"
            ).fetchone()
            db.execute("DELETE FROM entry WHERE slot = ?", (slot,))
            entries, size = entries - 1, size - freed

    def load(self, slots: Sequence[str]) -> dict[str, str]:
        """See `ReasoningStore`."""
        found: dict[str, str] = {}
        with self._transaction() as db:
            used = _next_use(db)
            for slot in slots:
                row = db.execute(
                    "UPDATE entry SET used = ? WHERE slot = ? RETURNING reasoning", (used, slot)
                ).fetchone()
                if row is not None and row[0] is not None:
                    found[slot] = _to_text(row[0])
        return found

    def close(self) -> None:
        """Close the file; a closed store cannot be used."""
        self._check_process()
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        with self._storage_errors("open"):
            with suppress(FileExistsError):
                # Before SQLite makes it readable for all; its log files take the same rights.
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(
                self._path,
                timeout=self._timeout_s,
                isolation_level=None,  # transactions are ours
                check_same_thread=False,  # the lock sees to it
            )
        try:
            with self._storage_errors("open"):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        """Check that the file is a store, or make it one."""
        self._is_new()  # first of all, so that a file of something else is not even put in WAL mode
        self._enter_wal_mode()
        # Survives a kill of the process; the last turns may be lost in a power failure.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._is_new():
                for statement in _statements(_SCHEMA):
                    self._db.execute(statement)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _is_new(self) -> bool:
        """Whether the file is empty; what is neither empty nor a store is an error."""
        # Tables first: another process may make them, and the marks with them, between two reads.
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if not tables and not application:
            return True
        if application != _APPLICATION_ID:
            raise StorageError(
                f"{self._path} is a database of something else", hint="give another path"
            )
        if version != _SCHEMA_VERSION:
            raise StorageError(
                f"{self._path}: expected schema version {_SCHEMA_VERSION}, got {version}",
                hint="delete it (it is a cache), or use the version of hadal that wrote it",
            )
        return False

    def _enter_wal_mode(self) -> None:
        """Have a log, which a kill cannot harm, instead of a journal; waits for other openers."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as err:
                busy = err.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() >= deadline:
                    raise
            # The pragma fails at once where another process is at it; a transaction waits its turn.
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("ROLLBACK")

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            # Closing the parent's connection here would drop the parent's locks: keep it, unused.
            self._forked.append(self._db)
            self._open()

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        self._check_process()
        with self._lock, self._storage_errors("use"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _storage_errors(self, doing: str) -> Generator[None]:
        try:
            yield
        except OSError as err:
            raise StorageError(
                f"cannot {doing} the reasoning store {self._path}: {err.strerror}"
            ) from err
        except sqlite3.Error as err:
            # The low byte is the kind; above it stand details. Python's own errors have no code.
            kind = getattr(err, "sqlite_errorcode", 0) & 0xFF
            broken = kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            hint = "delete it: it is a cache" if broken else None
            raise StorageError(
                f"cannot {doing} the reasoning store {self._path}: {err}", hint=hint
            ) from err


def _to_bytes(reasoning: str) -> bytes:
    return reasoning.encode("utf-8", "surrogatepass")


def _to_text(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogatepass")


def _size_of(blob: bytes | None) -> int:
    return _SLOT_BYTES + len(blob or b"")


def _next_use(db: sqlite3.Connection) -> int:
    """A time that only counts uses: clocks of several processes need not agree."""
    return db.execute("SELECT coalesce(max(used), 0) + 1 FROM entry").fetchone()[0]


def _statements(script: str) -> Iterator[str]:
    """Single statements: `executescript` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _check_bounds(max_entries: int, max_bytes: int) -> None:
    if max_entries < 1 or max_bytes < 1:
        raise InputError(
            f"expected at least 1 entry and 1 byte, got {max_entries:,} and {max_bytes:,}"
        )

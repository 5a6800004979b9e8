"""The durable log of a node: which boxes there are, and everything that was done in each.

One SQLite file in WAL mode. A record of a box is written before its effect ("begun") and completed after
it; docs/formats/journal.md describes the tables. With `synchronous=NORMAL` a record survives the death of
every process; a power failure may take the last ones, and takes the boxes too.
"""

import json
import sqlite3
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hadal.errors import JournalError
from hadal.node.faults import reach
from hadal.sandbox.protocol import digest_of
from hadal.sandbox.results import Event

__all__ = ["INLINE_BYTES", "BoxRecord", "Journal", "Record"]

VERSION = 1
INLINE_BYTES = 64 * 1024
"""Output up to this size lies in the file itself; more is a blob."""
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE boxes (
    id TEXT PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, name TEXT, trajectory TEXT, parent TEXT,
    spec TEXT NOT NULL, state TEXT NOT NULL, cause TEXT, created_ns INTEGER NOT NULL, ended_ns INTEGER,
    runtime TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX boxes_by_trajectory ON boxes (trajectory, created_ns);
CREATE TABLE events (
    box TEXT NOT NULL REFERENCES boxes (id), position INTEGER NOT NULL, kind TEXT NOT NULL,
    request_id TEXT NOT NULL, digest TEXT NOT NULL, request TEXT NOT NULL, guest_id INTEGER,
    state TEXT NOT NULL, began_ns INTEGER NOT NULL, ended_ns INTEGER, result TEXT,
    stdout BLOB, stderr BLOB,
    PRIMARY KEY (box, position)
) WITHOUT ROWID;
CREATE UNIQUE INDEX events_by_request ON events (box, request_id);
"""


@dataclass(frozen=True, kw_only=True)
class BoxRecord:
    """A box, as the journal has it. `runtime` is what a restarted daemon needs to find it again."""

    id: str
    request_id: str
    name: str | None
    trajectory: str | None
    parent: str | None
    spec: dict[str, Any]
    state: Literal["creating", "running", "paused", "gone"]
    cause: str | None
    created_ns: int
    ended_ns: int | None
    runtime: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record with what only the daemon needs: its command in the guest and its output."""

    event: Event
    box: str
    request_id: str
    guest_id: int | None
    stdout: bytes
    stderr: bytes


class Journal:
    """The file. One process at a time; all calls from one thread.

    Args:
        path: Of the file; made where it is missing.
        sync: "process" (default) or "power": whether every record waits for the disk.

    Raises:
        JournalError: Locked, damaged, of another version, or the disk is full.
    """

    def __init__(self, path: Path, *, sync: Literal["process", "power"] = "process") -> None:
        self.path = path
        with self._errors():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {'FULL' if sync == 'power' else 'NORMAL'}")
            self._open()

    def _open(self) -> None:
        tables = self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if not tables:
            self._db.executescript(
                f"BEGIN; {_SCHEMA} INSERT INTO meta VALUES ('version', '{VERSION}'); COMMIT;"
            )
        row = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if row is None or row[0] != str(VERSION):
            raise JournalError(
                f"{self.path}: a journal of version {VERSION} was expected, found {row and row[0]}",
                hint="another version of hadal wrote it; move it away or use that version",
            )
        damage = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise JournalError(
                f"{self.path} is damaged: {damage}",
                hint="`sqlite3 FILE .recover` saves what can be read; move the file away to go on",
            )

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(
                f"{self.path}: {error}",
                hint="free space on its disk" if "full" in str(error) else None,
            ) from error
        except OSError as error:
            raise JournalError(f"{self.path}: {error}", hint="free space on its disk") from error

    def _write(self, name: str, sql: str, values: tuple[object, ...]) -> None:
        with self._errors():
            reach(f"{name}.before")
            self._db.execute(sql, values)
            reach(f"{name}.after")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- boxes ---

    def add_box(self, box: BoxRecord) -> None:
        """Record a box that is about to be made."""
        self._write(
            "box.add",
            "INSERT INTO boxes VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (box.id, box.request_id, box.name, box.trajectory, box.parent, json.dumps(box.spec),
             box.state, box.cause, box.created_ns, box.ended_ns, json.dumps(box.runtime)),
        )  # fmt: skip

    def set_box(self, box: str, *, state: str, runtime: Mapping[str, Any]) -> None:
        """Record what has become of a box that lives."""
        self._write(
            "box.set",
            "UPDATE boxes SET state = ?, runtime = ? WHERE id = ?",
            (state, json.dumps(runtime), box),
        )

    def hand_over_box(self, box: BoxRecord) -> None:
        """Record that a box which nobody had been told of is the one of a request."""
        self._write(
            "box.hand_over",
            "UPDATE boxes SET request_id = ?, name = ?, trajectory = ?, spec = ?, created_ns = ?, runtime = ?"
            " WHERE id = ?",
            (box.request_id, box.name, box.trajectory, json.dumps(box.spec), box.created_ns,
             json.dumps(box.runtime), box.id),
        )  # fmt: skip

    def set_state(self, box: str, state: Literal["running", "paused"]) -> None:
        """Record that a box that lives is paused, or that it is no more."""
        self._write(
            "box.state",
            "UPDATE boxes SET state = ? WHERE id = ? AND state IN ('running', 'paused')",
            (state, box),
        )

    def set_spec(self, box: str, changes: Mapping[str, Any]) -> None:
        """Record that something of a box's spec has been changed."""
        self._write(
            "box.spec",
            "UPDATE boxes SET spec = json_patch(spec, ?) WHERE id = ?",
            (json.dumps(changes), box),
        )

    def end_box(self, box: str, cause: str) -> None:
        """Record the end of a box. What it had begun and nobody saw ending stays unknown."""
        now = time.time_ns()
        self._write(
            "box.end",
            "UPDATE boxes SET state = 'gone', cause = ?, ended_ns = ? WHERE id = ? AND state != 'gone'",
            (cause, now, box),
        )
        self._write(
            "box.end_events",
            "UPDATE events SET state = 'unknown', ended_ns = ? WHERE box = ? AND state = 'begun'",
            (now, box),
        )

    def forget_box(self, box: str) -> None:
        """Drop a box that nobody has been told of: the same request may make another."""
        self._write("box.forget", "DELETE FROM boxes WHERE id = ?", (box,))

    def _boxes(self, where: str, values: tuple[object, ...]) -> list[BoxRecord]:
        with self._errors():
            rows = self._db.execute(
                "SELECT id, request_id, name, trajectory, parent, spec, state, cause, created_ns,"
                f" ended_ns, runtime FROM boxes WHERE {where}",
                values,
            ).fetchall()
        return [
            BoxRecord(
                id=r[0],
                request_id=r[1],
                name=r[2],
                trajectory=r[3],
                parent=r[4],
                spec=json.loads(r[5]),
                state=r[6],
                cause=r[7],
                created_ns=r[8],
                ended_ns=r[9],
                runtime=json.loads(r[10]),
            )
            for r in rows
        ]

    def living_boxes(self) -> list[BoxRecord]:
        """Return every box whose end is not recorded."""
        return self._boxes("state != 'gone' ORDER BY created_ns", ())

    def box(self, box: str) -> BoxRecord | None:
        """Return a box by its id."""
        return next(iter(self._boxes("id = ?", (box,))), None)

    def box_of_request(self, request_id: str) -> BoxRecord | None:
        """Return the box that a request has made."""
        return next(iter(self._boxes("request_id = ?", (request_id,))), None)

    def box_of_trajectory(self, trajectory: str) -> BoxRecord | None:
        """Return the latest box of a trajectory."""
        found = self._boxes("trajectory = ? ORDER BY created_ns DESC LIMIT 1", (trajectory,))
        return next(iter(found), None)

    # --- events ---

    def begin(
        self, box: str, position: int, kind: str, request: Mapping[str, Any], *,
        request_id: str, guest_id: int | None, details: Mapping[str, Any] | None = None,
    ) -> Event:  # fmt: skip
        """Record what is about to be done. After this it counts as possibly done.

        The digest is of `request`; `details` are kept beside it and do not make it another one.
        """
        event = Event(
            position=position, kind=kind, request={**request, **(details or {})},
            digest=digest_of(kind, request),
            state="begun", began_ns=time.time_ns(), ended_ns=None, result=None,
        )  # fmt: skip
        self._write(
            "event.begin",
            "INSERT INTO events (box, position, kind, request_id, digest, request, guest_id, state,"
            " began_ns) VALUES (?,?,?,?,?,?,?,?,?)",
            (box, position, kind, request_id, event.digest, json.dumps(event.request), guest_id,
             event.state, event.began_ns),
        )  # fmt: skip
        return event

    def end(
        self, box: str, position: int, state: Literal["done", "refused", "unknown"],
        result: Mapping[str, Any], *, stdout: bytes = b"", stderr: bytes = b"",
    ) -> None:  # fmt: skip
        """Record what has come of it."""
        self._write(
            "event.end",
            "UPDATE events SET state = ?, ended_ns = ?, result = ?, stdout = ?, stderr = ?"
            " WHERE box = ? AND position = ?",
            (state, time.time_ns(), json.dumps(result), stdout, stderr, box, position),
        )

    def last_position(self, box: str) -> int:
        """Return the position of the last record; 0 where there is none."""
        with self._errors():
            found = self._db.execute("SELECT max(position) FROM events WHERE box = ?", (box,))
            return found.fetchone()[0] or 0

    def records(self, box: str, *, after: int = 0, limit: int = 1 << 31) -> list[Record]:
        """Return the records of a box behind a position, in order."""
        return self._records(
            "box = ? AND position > ? ORDER BY position LIMIT ?", (box, after, limit)
        )

    def record_of_request(self, box: str, request_id: str) -> Record | None:
        """Return the record that a request has made."""
        found = self._records("box = ? AND request_id = ?", (box, request_id))
        return next(iter(found), None)

    def set_guest_id(self, box: str, position: int, guest_id: int) -> None:
        """Record that a command, which the guest never heard of, is given to it under another number."""
        self._write(
            "event.again",
            "UPDATE events SET guest_id = ? WHERE box = ? AND position = ?",
            (guest_id, box, position),
        )

    def begun(self, box: str) -> list[Record]:
        """Return the records whose end is not known."""
        return self._records("box = ? AND state = 'begun' ORDER BY position", (box,))

    def _records(self, where: str, values: tuple[object, ...]) -> list[Record]:
        with self._errors():
            rows = self._db.execute(
                "SELECT box, position, kind, request_id, digest, request, guest_id, state, began_ns,"
                f" ended_ns, result, stdout, stderr FROM events WHERE {where}",
                values,
            ).fetchall()
        return [
            Record(
                event=Event(
                    position=r[1],
                    kind=r[2],
                    digest=r[4],
                    request=json.loads(r[5]),
                    state=r[7],
                    began_ns=r[8],
                    ended_ns=r[9],
                    result=None if r[10] is None else json.loads(r[10]),
                ),
                box=r[0],
                request_id=r[3],
                guest_id=r[6],
                stdout=r[11] or b"",
                stderr=r[12] or b"",
            )
            for r in rows
        ]

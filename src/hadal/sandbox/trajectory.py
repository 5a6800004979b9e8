"""Coming back to a box: what was done is answered from its log, and only what is new is done.

The log is read once; after that a recorded command costs a comparison, and no request.
"""

import base64
from dataclasses import dataclass
from typing import Any

from hadal.errors import (
    CommandRefusedError,
    ReplayDivergedError,
    SandboxFileError,
    UnknownOutcomeError,
)
from hadal.sandbox.client import NodeClient
from hadal.sandbox.protocol import digest_of
from hadal.sandbox.results import ExecResult

__all__ = ["Logged", "Recorded", "read_log"]

_PAGE = 5000


@dataclass(frozen=True, slots=True)
class Logged:
    """A record as the node tells it; output still encoded."""

    position: int
    kind: str
    request: dict[str, Any]
    digest: str
    request_id: str
    state: str
    began_ns: int
    ended_ns: int | None
    result: dict[str, Any] | None
    stdout: str
    stderr: str

    def outcome(self) -> ExecResult | None:
        """Return the result of a command; None for a change of files that succeeded.

        Raises:
            SandboxFileError, CommandRefusedError, UnknownOutcomeError: As when it was done.
        """
        result = self.result or {}
        if self.state == "refused":
            raise CommandRefusedError(str(result.get("message")), errno=int(result.get("errno", 0)))
        if self.state != "done":
            raise UnknownOutcomeError(
                f"step {self.position}: whether {self.kind} was done is not known",
                hint="look at the box, then go on with a new trajectory",
            )
        if self.kind != "command":
            if "errno" in result:
                raise SandboxFileError(result["errno"], result.get("filename", ""))
            return None
        fields = {k: v for k, v in result.items() if not k.endswith("_blob")}
        return ExecResult(
            **fields,
            stdout_bytes=base64.b64decode(self.stdout) if self.stdout else b"",
            stderr_bytes=base64.b64decode(self.stderr) if self.stderr else b"",
            id=self.position,
            recorded=True,
        )


async def read_log(client: NodeClient, box: str, *, after: int = 0) -> list[Logged]:
    """Return the log of a box behind a position."""
    found: list[Logged] = []
    while True:
        query = {"after": str(found[-1].position if found else after), "limit": str(_PAGE)}
        body = await client.request("GET", f"/v1/boxes/{box}/log", query=query)
        page = [Logged(**record) for record in body["records"]]
        found += page
        if len(page) < _PAGE:
            return found


class Recorded:
    """The records that have not been asked for again."""

    def __init__(self, records: list[Logged]) -> None:
        self._records = records
        self._first = 0
        self._claimed: set[int] = set()

    def __len__(self) -> int:
        return len(self._records) - self._first - len(self._claimed)

    def take(self, kind: str, request: dict[str, Any]) -> Logged | None:
        """Return the record of a request, or None when all have been taken.

        Requests come in the order of the log. Those that were under way at the same time may come in
        any order: nothing says which was first.

        Raises:
            ReplayDivergedError: It is not what is recorded there.
        """
        if self._first == len(self._records):
            return None
        digest = digest_of(kind, request)
        first = self._records[self._first]
        if first.digest == digest:
            self._first += 1
            while self._first in self._claimed:
                self._claimed.discard(self._first)
                self._first += 1
            return first
        for index in range(self._first + 1, len(self._records)):
            record = self._records[index]
            if first.ended_ns is not None and record.began_ns > first.ended_ns:
                break
            if index not in self._claimed and record.digest == digest:
                self._claimed.add(index)
                return record
        raise ReplayDivergedError(
            position=first.position,
            recorded=_describe(first.kind, first.request),
            asked=_describe(kind, request),
            hint=f"go on in a branch: a fresh box, and its replay(<id of this one>, before={first.position})",
        )


def _describe(kind: str, request: dict[str, Any]) -> str:
    what = request.get("shell") or request.get("argv") or request.get("path") or request
    return f"{kind} {str(what)[:120]!r}"

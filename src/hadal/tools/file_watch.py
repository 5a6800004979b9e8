"""What has become of the files of a box between two looks, for people who read a run afterwards.

A look lists what differs from the image, without reading it, and then reads the small texts among what is new.
Where a box has changed very many files, nothing is looked at any more: it would cost more than it tells.
"""

import difflib
from collections.abc import Iterable

from hadal.errors import SandboxFileError
from hadal.sandbox import AsyncSandbox
from hadal.sandbox.results import Change
from hadal.tools.cut import OUTPUT_FOLDER
from hadal.tools.regular_file import read_regular
from hadal.tools.tool import FileDiff, ToolUseError

__all__ = ["FileWatch"]

_PATHS_MAX = 2000
_TEXT_BYTES = 32 << 10
_TEXTS_MAX = 200
_FILES_SHOWN = 20
_DIFF_LINES = 60


class FileWatch:
    """Looks at a box; what happens between two looks is one difference, whoever did it.

    Args:
        box: At which.
    """

    def __init__(self, box: AsyncSandbox) -> None:
        self._box = box
        self._known: dict[str, Change] | None = None
        self._texts: dict[str, str] = {}
        self._too_many = False

    async def begin(self) -> None:
        """See how things stand, unless that is known.

        Raises:
            SandboxError: The box failed.
        """
        if self._known is None:
            await self.look()

    async def look(self) -> tuple[FileDiff, ...]:
        """Return what is other than at the last look; nothing at the first.

        Raises:
            SandboxError: The box failed.
        """
        if self._too_many:
            return ()
        try:
            listed = await self._box.changes(content=False, limit=_PATHS_MAX)
        except SandboxFileError:
            self._too_many = True
            return ()
        now = {c.path: c for c in listed if not (c.directory or c.path.startswith(OUTPUT_FOLDER))}
        before, self._known = self._known, now
        gone = _gone(before or {}, now)
        new = [p for p, c in now.items() if c.kind == "written" and _is_other(c, before or {})]
        found = [self._removed(path) for path in gone]
        for path in new if before is None else new[:_FILES_SHOWN]:
            old, text = self._texts.get(path), await self._read(now[path])
            kind = "changed" if path in (before or {}) else "written"
            found.append(FileDiff(path=path, kind=kind, diff=_diff(old, text, kind)))
        return () if before is None else tuple(found)

    def _removed(self, path: str) -> FileDiff:
        old = self._texts.pop(path, None)
        return FileDiff(path=path, kind="removed", diff=_diff(old, "", "changed"))

    async def _read(self, change: Change) -> str | None:
        """Return a small text, and remember it."""
        self._texts.pop(change.path, None)
        if change.size > _TEXT_BYTES or len(self._texts) >= _TEXTS_MAX:
            return None
        try:
            data = await read_regular(self._box, change.path, _TEXT_BYTES, user="0")
        except (SandboxFileError, ToolUseError):  # it went while we looked, or is no small file
            return None
        if b"\0" in data:
            return None
        return self._texts.setdefault(change.path, data.decode(errors="replace"))


def _gone(before: dict[str, Change], now: dict[str, Change]) -> list[str]:
    """Return the files that are no more; those of the image have a mark in their place."""
    there = [path for path, change in before.items() if change.kind != "removed"]
    marked = [p for p, c in now.items() if c.kind == "removed" and _is_other(c, before)]
    return sorted({*(path for path in there if path not in now), *marked})


def _is_other(change: Change, before: dict[str, Change]) -> bool:
    old = before.get(change.path)
    return old is None or (old.changed_ns, old.size) != (change.changed_ns, change.size)


def _diff(old: str | None, new: str | None, kind: str) -> str:
    if new is None or (old is None and kind != "written"):
        return ""
    lines = difflib.unified_diff((old or "").splitlines(), new.splitlines(), lineterm="", n=2)
    return "\n".join(_cut(list(lines)[2:]))


def _cut(lines: list[str]) -> Iterable[str]:
    if len(lines) <= _DIFF_LINES:
        return lines
    return [*lines[:_DIFF_LINES], f"... {len(lines) - _DIFF_LINES} more lines"]

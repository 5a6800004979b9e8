"""`str_replace_editor`: look at files and change them by quoting what is there."""

from dataclasses import dataclass
from typing import Any

from hadal.chat import Tool
from hadal.errors import CommandRefusedError, SandboxFileError
from hadal.sandbox import AsyncSandbox
from hadal.sandbox.trajectory import read_log
from hadal.tools.cut import KEPT_BYTES
from hadal.tools.regular_file import check_regular, read_regular
from hadal.tools.tool import Said, ToolOutput, ToolUseError

__all__ = ["EditorTool"]

_CONTEXT_LINES = 3
_FILE_BYTES = 16 << 20


@dataclass
class EditorTool:
    """An editor in a box.

    Attributes:
        box: Where.
    """

    box: AsyncSandbox

    @property
    def declaration(self) -> Tool:
        """Return name, description and schema."""
        return self.declare()

    @staticmethod
    def declare() -> Tool:
        """Return the same without a box."""
        text, line = {"type": "string"}, {"type": "integer"}
        return Tool.of(
            "str_replace_editor",
            "View, create and edit files. old_str must be in the file exactly once.",
            {
                "type": "object",
                "properties": {
                    "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
                    "path": text,
                    "file_text": text,
                    "old_str": text,
                    "new_str": text,
                    "insert_line": line,
                    "view_range": {"type": "array", "items": line, "minItems": 2, "maxItems": 2},
                },
                "required": ["command", "path"],
                "additionalProperties": False,
            },
        )  # fmt: skip

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Do one command; see `RunningTool.call`."""
        path = str(arguments["path"])
        if not path.startswith("/"):
            raise ToolUseError(f"path must be absolute, got {path}")
        if "\0" in path:
            raise ToolUseError("path has a zero byte, which no file name has")
        try:
            match arguments["command"]:
                case "view":
                    return await self._view(path, arguments.get("view_range"), request_id)
                case "create":
                    return await self._create(path, _needed(arguments, "file_text"), request_id)
                case "str_replace":
                    old, new = _needed(arguments, "old_str"), arguments.get("new_str", "")
                    return await self._replace(path, old, new, request_id)
                case _:
                    line, text = _needed(arguments, "insert_line"), _needed(arguments, "new_str")
                    return await self._insert(path, int(line), text, request_id)
        except SandboxFileError as error:
            raise ToolUseError(error.message) from error

    async def _view(self, path: str, lines: list[float] | None, request_id: str) -> ToolOutput:
        if (await self.box.files.stat(path)).kind == "directory":
            return await self._list(path, request_id)
        rows = _rows(await self._read(path))
        first, last = 1, len(rows)
        if lines is not None:
            first, last = int(lines[0]), len(rows) if lines[1] == -1 else int(lines[1])
            if not 1 <= first <= last <= len(rows):
                raise ToolUseError(
                    f"view_range {lines} is not within the {len(rows)} lines of {path}"
                )
        return ToolOutput(text=_numbered(rows[first - 1 : last], first) or "(empty file)")

    async def _list(self, path: str, request_id: str) -> ToolOutput:
        """List what is in a directory and not hidden; where it lies itself does not matter."""
        find = ("find", "-H", path, "-mindepth", "1", "-maxdepth", "2", "-name", ".?*", "-prune", "-o", "-print")  # fmt: skip
        try:
            result = await self.box.run(find, output_limit=KEPT_BYTES, request_id=request_id)
        except CommandRefusedError as error:
            raise ToolUseError(f"find was not started: {error.message}") from error
        names = sorted(result.stdout_bytes.removesuffix(b"\n").split(b"\n"))
        parts = [path, *(name.decode(errors="replace") for name in names if name)]
        parts += result.stderr.splitlines()
        parts += ["[not all of it: there is too much]"] if result.truncated else []
        text = "".join(f"{part}\n" for part in parts)
        return ToolOutput(text=text, failed=not result.ok, step=result.id)

    async def _create(self, path: str, text: str, request_id: str) -> ToolOutput:
        there = await self.box.files.exists(path)
        if there:
            check_regular(await self.box.files.stat(path))
        await self._write(path, text, request_id)
        return ToolOutput(text=f"{'Overwritten' if there else 'Created'}: {path}")

    async def _replace(self, path: str, old: str, new: str, request_id: str) -> ToolOutput:
        if not old:
            raise ToolUseError("old_str is empty: quote the text that is to be replaced")
        text = await self._read(path)
        count = text.count(old)
        if count != 1 and await self._done(request_id):  # by this very call, before a crash
            return ToolOutput(text=f"Edited: {path}")
        if count != 1:
            found = "not" if count == 0 else f"{count} times"
            hint = "quote it exactly" if count == 0 else "quote more lines around it"
            raise ToolUseError(f"old_str is {found} in {path}: {hint}")
        at = text.index(old)
        changed = text[:at] + new + text[at + len(old) :]
        await self._write(path, changed, request_id)
        first = text.count("\n", 0, at) + 1
        return _edited(path, changed, first, first + new.count("\n"))

    async def _insert(self, path: str, line: int, text: str, request_id: str) -> ToolOutput:
        there = await self._read(path)
        rows = _rows(there)
        if not 0 <= line <= len(rows):
            raise ToolUseError(f"insert_line must be 0 to {len(rows)}, got {line}")
        at = sum(len(row) + 1 for row in rows[:line])
        before, after = there[:at], there[at:]
        if before and not before.endswith("\n"):
            before += "\n"
        ended = text if text.endswith("\n") or not after else text + "\n"
        changed = before + ended + after
        await self._write(path, changed, request_id)
        return _edited(path, changed, line + 1, line + len(_rows(ended)))

    async def _read(self, path: str) -> str:
        try:
            return (await read_regular(self.box, path, _FILE_BYTES)).decode()
        except UnicodeDecodeError:
            raise ToolUseError(f"{path} is no text: use bash") from None

    async def _done(self, request_id: str) -> bool:
        records = await read_log(self.box.client, self.box.id)
        return any(r.request_id == request_id and r.state == "done" for r in records)

    async def _write(self, path: str, text: str, request_id: str) -> None:
        await self.box.files.write(path, text.encode(), parents=True, request_id=request_id)


def _needed(arguments: dict[str, Any], name: str) -> Any:
    """Return an argument that the schema lets out; its type is as declared."""
    if name not in arguments:
        raise ToolUseError(f"{arguments['command']} needs {name}")
    return arguments[name]


def _rows(text: str) -> list[str]:
    """Return the lines as `grep -n` counts them: nothing but a line feed ends one."""
    return text.removesuffix("\n").split("\n") if text else []


def _numbered(rows: list[str], first: int) -> str:
    return "\n".join(f"{number:6}\t{row}" for number, row in enumerate(rows, first))


def _edited(path: str, text: str, first: int, last: int) -> ToolOutput:
    """Tell what the place looks like now."""
    start = max(1, first - _CONTEXT_LINES)
    shown = _numbered(_rows(text)[start - 1 : last + _CONTEXT_LINES], start)
    return ToolOutput(text=f"Edited: {path}\n{shown}")

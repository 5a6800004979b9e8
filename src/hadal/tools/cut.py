"""What a model is shown of what is long: beginning and end, with all of it in a file of the box; and of a command."""

from hadal.errors import SandboxFileError
from hadal.sandbox import AsyncSandbox, ExecResult
from hadal.tools.tool import ToolOutput

__all__ = ["KEPT_BYTES", "OUTPUT_BYTES", "OUTPUT_FOLDER", "command_output", "cut_output"]

KEPT_BYTES = 32 << 20
"""Of an output that leaves the box."""

OUTPUT_BYTES = 16_000
"""Bytes of an output that a model is shown: some 4,000 tokens."""
OUTPUT_FOLDER = "/tmp/.hadal"
"""In the box: what did not fit."""


async def cut_output(
    box: AsyncSandbox | None, data: bytes, name: str, limit: int = OUTPUT_BYTES
) -> tuple[str, str | None]:
    """Return an output as text, and where all of it lies if it had to be cut and could be kept.

    Args:
        box: Where the whole goes; without one it is not kept.
        data: The output; bytes that are no UTF-8 become U+FFFD.
        name: Of the file, if one is needed.
        limit: Bytes to show.

    Raises:
        SandboxError: The box failed.
    """
    if len(data) <= limit:
        return data.decode(errors="replace"), None
    path, kept = await _keep(box, data, f"{OUTPUT_FOLDER}/{name}")
    head, tail = data[: limit // 2], data[len(data) - limit // 2 :]
    left_out = len(data) - len(head) - len(tail)
    note = f"\n[{left_out:,} bytes left out here; all {len(data):,} {kept}]\n"
    return head.decode(errors="replace") + note + tail.decode(errors="replace"), path


async def _keep(box: AsyncSandbox | None, data: bytes, path: str) -> tuple[str | None, str]:
    """Write all of an output into the box; return where it is, and how to say so."""
    if box is None:
        return None, "are not kept"
    try:
        # As `bash` makes it, so that it can keep its state there, whoever it runs as.
        await box.files.mkdir(OUTPUT_FOLDER, mode=0o1777, parents=True, user="0")
        await box.files.write(path, data, parents=True, user="0")
    except SandboxFileError as error:  # as where its disk is full
        return None, f"could not be kept: {error.message}"
    return path, f"are in {path}"


async def command_output(
    box: AsyncSandbox, result: ExecResult, limit: int, *, late: str
) -> ToolOutput:
    """Return what a model is told of a command whose streams are one.

    Args:
        box: Where it ran.
        result: How it ended.
        limit: Bytes to show.
        late: What to say where it was killed because of its time.

    Raises:
        SandboxError: The box failed.
    """
    text, path = await cut_output(box, result.stdout_bytes, f"output-{result.id}.txt", limit)
    notes: list[str] = []
    if result.truncated:
        notes.append(f"[only parts of {result.stdout_total:,} bytes were kept]")
    if result.timed_out:
        notes.append(f"[{late}]")
    elif result.oom_killed:
        notes.append("[a process was killed: the box has no memory left]")
    elif result.exit_code:
        notes.append(f"[exit code {result.exit_code}]")
    if notes and text and not text.endswith("\n"):
        text += "\n"
    return ToolOutput(
        text=text + "\n".join(notes) or "(no output)", fits=True, failed=not result.ok,
        exit_code=result.exit_code, step=result.id, full_text=path,
    )  # fmt: skip

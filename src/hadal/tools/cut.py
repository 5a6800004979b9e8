"""Long outputs: beginning and end for the model, all of it in a file of the box."""

from hadal.sandbox import AsyncSandbox

__all__ = ["OUTPUT_BYTES", "OUTPUT_FOLDER", "cut_output"]

OUTPUT_BYTES = 16_000
"""Bytes of an output that a model is shown: some 4,000 tokens."""
OUTPUT_FOLDER = "/tmp/.hadal"
"""In the box: what did not fit."""


async def cut_output(
    box: AsyncSandbox, data: bytes, name: str, limit: int = OUTPUT_BYTES
) -> tuple[str, str | None]:
    """Return an output as text, and where all of it lies if it had to be cut.

    Args:
        box: Where the whole goes.
        data: The output; bytes that are no UTF-8 become U+FFFD.
        name: Of the file, if one is needed.
        limit: Bytes to show.

    Raises:
        SandboxError: The box failed.
    """
    if len(data) <= limit:
        return data.decode(errors="replace"), None
    path = f"{OUTPUT_FOLDER}/{name}"
    await box.files.write(path, data, parents=True, user="0")
    head, tail = data[: limit // 2], data[len(data) - limit // 2 :]
    left_out = len(data) - len(head) - len(tail)
    note = f"\n[{left_out:,} bytes left out here; all {len(data):,} are in {path}]\n"
    return head.decode(errors="replace") + note + tail.decode(errors="replace"), path

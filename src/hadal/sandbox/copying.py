"""Copies between this machine and boxes, with the rules of cp: into a directory that exists, else to a name."""

import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import InputError, SandboxFileError, UnsafeFileError
from hadal.sandbox.box import AsyncSandbox
from hadal.sandbox.nodes import AsyncNode

__all__ = ["Place", "copy", "read_place"]


@dataclass(frozen=True)
class Place:
    """One side of a copy.

    Attributes:
        path: `-` is a tar stream on standard input or output, where there is no box.
        box: Of whom the path is; None for this machine.
    """

    path: str
    box: str | None = None

    @property
    def is_stream(self) -> bool:
        """Whether it is standard input or output."""
        return self.box is None and self.path == "-"


def read_place(text: str) -> Place:
    """Read `BOX:/path`, a local path or `-`. A local path with a colon begins with `/` or `./`.

    Raises:
        InputError: The path in the box is not absolute, or a side is empty.
    """
    box, colon, path = text.partition(":")
    if not text:
        raise InputError("a side of the copy is empty", hint="expected BOX:/path, a path or `-`")
    if not colon or not box or "/" in box or box.startswith("."):
        return Place(text)
    if not path.startswith("/"):
        raise InputError(
            f"a path in a box begins with /, got {path!r} in {text!r}",
            hint=f"{box}:/{path}, or ./{text} for a file here",
        )
    return Place(path, box)


async def copy(node: AsyncNode, source: Place, target: Place) -> None:
    """Copy files and directories. Owners are not kept; modes, times and links are.

    Raises:
        InputError: Neither side is a box, or the source is not there.
        SandboxFileError: The box says no.
    """
    if source.box is None and target.box is None:
        raise InputError("neither side is in a box", hint="write that side as BOX:/path")
    if source.box is None:
        await _put(await node.open(str(target.box)), source, target.path)
    elif target.box is None:
        await _get(await node.open(source.box), source.path, target)
    else:
        with tempfile.TemporaryDirectory(prefix="hadal-cp-") as folder:
            between = Place(str(Path(folder) / (_name(source.path) or "root")))
            await _get(await node.open(source.box), source.path, between)
            await _put(await node.open(target.box), between, target.path)


def _name(path: str) -> str:
    return os.path.basename(path.rstrip("/"))  # noqa: PTH119 - it may be of another machine


async def _put(box: AsyncSandbox, source: Place, path: str) -> None:
    if source.is_stream:
        await _unpack_stdin(box, path)
        return
    local = Path(source.path)
    if not local.exists():
        raise InputError(f"{source.path}: no such file or directory")
    into = await _is_directory(box, path)
    if path.endswith("/") and not into and not local.is_dir():
        raise InputError(f"{box.id}:{path} is no directory", hint="leave the / at its end out")
    name = _name(str(local.resolve()))
    await box.files.upload(local, f"{path.rstrip('/')}/{name}" if into and name else path)


async def _is_directory(box: AsyncSandbox, path: str) -> bool:
    try:
        return (await box.files.stat(path)).kind == "directory"
    except SandboxFileError:
        return False


async def _unpack_stdin(box: AsyncSandbox, path: str) -> None:
    if sys.stdin.isatty():
        raise InputError("expected a tar stream on standard input, which is a terminal")
    with tempfile.NamedTemporaryFile(suffix=".tar") as packed:
        while chunk := os.read(0, 1 << 18):
            packed.write(chunk)
        packed.flush()
        await box.files.mkdir(path, parents=True)
        await box.files.unpack(path, Path(packed.name))


async def _get(box: AsyncSandbox, path: str, target: Place) -> None:
    if target.is_stream:
        if sys.stdout.isatty():
            raise InputError("a tar stream does not go to a terminal", hint="add `| tar -tv`")
        async for chunk in box.files.pack(path):
            sys.stdout.buffer.write(chunk)
        return
    local = Path(target.path)
    kind = (await box.files.stat(path)).kind
    if local.is_dir() and _name(path):
        local /= _name(path)
    elif target.path.endswith("/") and kind != "directory":
        raise InputError(f"{target.path} is no directory", hint="make it, or leave the / out")
    if kind == "directory":
        try:
            await box.files.download(path, local)
        except UnsafeFileError as error:
            raise InputError(
                f"{box.id}:{path} has something that does not come out of a box: {error}",
                hint=f"`hadal box cp {box.id}:{path} - > FILE.tar` takes all of it, unopened",
            ) from error
        return
    if kind != "file":
        raise InputError(f"{box.id}:{path} is a {kind}, no file or directory")
    async with _whole_or_nothing(local) as part:
        await box.files.download(path, part)
        part.chmod((await box.files.stat(path)).mode & 0o777)


@contextlib.asynccontextmanager
async def _whole_or_nothing(path: Path) -> AsyncGenerator[Path]:
    """Yield a name beside a path, which takes its place when all of it is written."""
    if path.exists() and not path.is_file():  # /dev/null, a pipe
        yield path
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)

"""`hadal box run` and `hadal box shell`: a command of a box on this terminal, or in a pipe."""

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hadal.cli.node_options import NodeOptions
from hadal.cli.quantities import human_bytes, parse_bytes, parse_seconds, read_pairs
from hadal.errors import CommandRefusedError, InputError

if TYPE_CHECKING:
    from hadal.sandbox.box import AsyncSandbox
    from hadal.sandbox.nodes import AsyncNode
    from hadal.sandbox.results import ExecResult

__all__ = ["run", "shell"]

_Seconds = Annotated[float | None, Parameter(converter=parse_seconds)]
_Many = Annotated[list[str] | None, Parameter(negative="")]
_Bytes = Annotated[int, Parameter(converter=parse_bytes)]
_OUTPUT = 256 << 20
_TIMED_OUT, _NOT_RUN, _NO_PROGRAM, _FAILED = 124, 126, 127, 3
_NO_ENTRY = 2
_A_SHELL = 'exec "$(command -v bash || echo /bin/sh)" -l'


def run(
    *words: str,
    image: str | None = None,
    line: Annotated[str | None, Parameter(name=("--line", "-c"))] = None,
    timeout: _Seconds = None,
    user: str | None = None,
    cwd: str | None = None,
    env: _Many = None,
    output_limit: _Bytes = _OUTPUT,
    no_stdin: Annotated[bool, Parameter(negative="")] = False,
    where: NodeOptions | None = None,
) -> None:
    """Run a command in a box: hadal box run BOX -- COMMAND, or hadal box run --image IMAGE -- COMMAND.

    Its output is passed on as it comes, standard error apart. Its input is that of this program, unless
    that is a terminal. Ctrl-C goes to the command; a second one kills it.

    The exit code is that of the command; 124 when it took too long, 126 and 127 when it could not be
    started, 3 when the box or its node fails.

    Examples:
        hadal box run build -- make -j2

        hadal box run build -c 'ls /tmp | wc -l'

        tar -c src | hadal box run --image host -- tar -xC /tmp

    Args:
        words: The box, where there is no --image, and the command.
        image: Make a box of this image for the command, and end it afterwards.
        line: A line for the shell of the image, instead of a command.
        timeout: Time after which it is killed, as 90s or 5m.
        user: Who runs it: a user of the image, or uid:gid.
        cwd: Where it starts.
        env: NAME=VALUE; can be repeated.
        output_limit: Of each stream; what is beyond it is lost, which is said, and the exit code is 3.
        no_stdin: Give it no input.
        where: The node.
    """
    box, argv = (None, words) if image is not None else (words[0] if words else None, words[1:])
    if image is None and box is None:
        raise InputError("expected a box, or --image", hint="hadal box run BOX -- COMMAND")
    if bool(argv) == (line is not None):
        raise InputError("expected a command, or a line (-c)", hint="hadal box run BOX -- COMMAND")
    # Without standard input its number may be that of something else by now.
    forward = not no_stdin and sys.stdin is not None and not os.isatty(0)
    options: dict[str, Any] = {
        "timeout_s": timeout,
        "user": user,
        "cwd": cwd,
        "env": read_pairs("--env", env or ()),
        "output_limit": output_limit,
        "interactive": forward,
    }
    command = line if line is not None else argv
    sys.exit(asyncio.run(_run(where or NodeOptions(), box, image, command, options)))


async def _run(
    where: NodeOptions,
    name: str | None,
    image: str | None,
    command: str | Sequence[str],
    options: dict[str, Any],
) -> int:
    from hadal.sandbox.console import run_piped

    async with where.open() as node, AsyncExitStack() as stack:
        box = await _box(node, stack, name, image)
        try:
            process = await box.spawn(command, **options)
            result = await run_piped(process, forward_stdin=options["interactive"])
        except CommandRefusedError as error:
            _say(error.message)
            return _NO_PROGRAM if error.errno == _NO_ENTRY else _NOT_RUN
    return _exit_code(result, options["output_limit"])


async def _box(
    node: "AsyncNode", stack: AsyncExitStack, name: str | None, image: str | None
) -> "AsyncSandbox":
    if name is not None:
        return await node.open(name)
    from hadal.sandbox.specs import ContainerSpec

    assert image is not None
    return await stack.enter_async_context(await node.create(ContainerSpec(image=image)))


def _exit_code(result: "ExecResult", limit: int) -> int:
    if result.truncated:
        _say(
            f"output is missing: more than {human_bytes(limit)} of a stream (--output-limit)\n"
            f"the command itself: {result.describe()}"
        )
        return _FAILED
    if result.timed_out is not None:
        _say(result.describe())
        return _TIMED_OUT
    if result.oom_killed:
        _say(result.describe())
    return result.exit_code


def _say(text: str) -> None:
    sys.stderr.write(f"hadal: {text}\n")


def shell(
    box: str,
    /,
    *command: str,
    attach: int | None = None,
    user: str | None = None,
    cwd: str | None = None,
    env: _Many = None,
    where: NodeOptions | None = None,
) -> None:
    """Open a shell in a box, or another command with a terminal.

    Ctrl-] leaves it and lets it go on; `--attach` comes back to it, with what it has written meanwhile.

    Examples:
        hadal box shell build

        hadal box shell build -- python3 -i

    Args:
        box: Which.
        command: What to run. Default: bash, or sh.
        attach: Number of a command to come back to, as `hadal box log` shows it.
        user: Who runs it.
        cwd: Where it starts.
        env: NAME=VALUE; can be repeated.
        where: The node.
    """
    from hadal.sandbox.console import terminal_size

    size = terminal_size()
    if attach is not None and command:
        raise InputError("--attach comes back to a command; it does not start one")
    here = {"TERM": os.environ.get("TERM", "xterm-256color")}
    options: dict[str, Any] = {
        "user": user,
        "cwd": cwd,
        "env": here | read_pairs("--env", env or ()),
        "tty": size,
        "output_limit": _OUTPUT,
    }
    argv = command or ("/bin/sh", "-c", _A_SHELL)
    sys.exit(asyncio.run(_shell(where or NodeOptions(), box, argv, attach, options)))


async def _shell(
    where: NodeOptions,
    name: str,
    command: Sequence[str],
    attach: int | None,
    options: dict[str, Any],
) -> int:
    from hadal.sandbox.console import run_terminal

    async with where.open() as node:
        box = await node.open(name)
        try:
            process = await (
                box.spawn(command, **options) if attach is None else box.attach(attach)
            )
            result = await run_terminal(process)
        except CommandRefusedError as error:
            _say(error.message)
            return _NO_PROGRAM if error.errno == _NO_ENTRY else _NOT_RUN
        if result is None:
            await process.detach()
            _say(f"left; `hadal box shell {box.id} --attach {process.id}` comes back")
            return 0
    return _exit_code(result, _OUTPUT)

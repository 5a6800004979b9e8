"""A command of a box on the standard streams of this process: piped, or with this terminal."""

import asyncio
import concurrent.futures
import contextlib
import fcntl
import os
import signal
import struct
import sys
import termios
import threading
import tty
from asyncio import CancelledError
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import partial
from typing import Any

from hadal.errors import ConfigError, HadalError
from hadal.sandbox.process import AsyncProcess
from hadal.sandbox.results import ExecResult

__all__ = ["DETACH_KEY", "run_piped", "run_terminal", "terminal_size"]

DETACH_KEY = b"\x1d"
"""Ctrl-], as in telnet: no shell or editor needs it."""
_GRACE_S = 10
_CHUNK = 64 * 1024


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _signals(*numbers: int, call: Callable[[int], None]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, call, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Interrupts:
    """What Ctrl-C and its like do to a command: first the signal itself, then SIGKILL, then we leave."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    def __call__(self, number: int) -> None:
        self._count += 1
        if self._count > 2:
            os._exit(128 + number)  # the node or the reader of our output does not answer
        first = self._count == 1
        self.kill(number if first else signal.SIGKILL)
        if first:
            self._loop.call_later(_GRACE_S, self.kill, signal.SIGKILL)

    def kill(self, number: int) -> None:
        """Send a signal; soon."""
        task = self._loop.create_task(self._send(number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, number: int) -> None:
        with contextlib.suppress(HadalError):  # it has ended, or the stream says what is wrong
            await self._process.kill(number)


async def run_piped(process: AsyncProcess, *, forward_stdin: bool) -> ExecResult:
    """Pass the output of a command on as it comes, to the descriptor that it was meant for.

    Ctrl-C, SIGTERM and SIGHUP go to the command; it is killed after ten seconds, or at the second one.

    Args:
        process: Started with `interactive` where its input is forwarded.
        forward_stdin: Whether it gets the standard input of this process.

    Returns:
        Its result, without the output.

    Raises:
        BrokenPipeError: Nobody reads the output any more; the command is killed.
    """
    interrupts, failures = _Interrupts(process), list[HadalError]()
    if forward_stdin:
        feed = partial(_feed, process, asyncio.get_running_loop(), interrupts, failures)
        threading.Thread(target=feed, daemon=True).start()
    with _signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, call=interrupts):
        try:
            async for name, data in process:
                # In a thread: the connection must be served while a slow reader blocks us.
                await asyncio.to_thread(_write_all, 1 if name == "stdout" else 2, data)
        except BrokenPipeError:
            await process.kill()
            raise
    if failures:  # half of the input is not what was asked for
        raise failures[0]
    return await process.wait()


def _feed(
    process: AsyncProcess,
    loop: asyncio.AbstractEventLoop,
    interrupts: _Interrupts,
    failures: list[HadalError],
) -> None:
    """Give it our input. In a thread, since a file or a pipe may block whoever reads it."""

    def call(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result()

    try:
        while data := _read_stdin():
            call(process.write(data))
        call(process.close_stdin())
    except HadalError as error:
        failures.append(error)
        loop.call_soon_threadsafe(interrupts.kill, signal.SIGKILL)
    except (RuntimeError, CancelledError, concurrent.futures.CancelledError):
        pass  # the command has ended first, and the loop with it: its input is nobody's


def _read_stdin() -> bytes:
    try:
        return os.read(0, _CHUNK)
    except OSError:  # it is closed, or the other end of a terminal is
        return b""


def terminal_size() -> tuple[int, int]:
    """Return rows and columns of the terminal of standard input.

    Raises:
        ConfigError: It is none.
    """
    if not (os.isatty(0) and os.isatty(1)):
        raise ConfigError(
            "standard input and output are no terminal, and a shell needs one",
            hint="`hadal box run BOX -- COMMAND` works with pipes and files",
        )
    return _size()


def _size() -> tuple[int, int]:
    raw = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
    rows, columns, _, _ = struct.unpack("HHHH", raw)
    return rows or 24, columns or 80


async def run_terminal(process: AsyncProcess) -> ExecResult | None:
    """Connect this terminal with that of a command; return its result, or None where the user detached.

    The terminal is put into raw mode and restored, whatever happens: Ctrl-C is a key like any other.

    Args:
        process: Started, or attached to, with a terminal.
    """
    async with _raw_terminal(), _Terminal(process) as terminal:
        return await terminal.until_end()


@contextlib.asynccontextmanager
async def _raw_terminal() -> AsyncGenerator[None]:
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)  # what is typed already is kept
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class _Terminal:
    """The two directions between a terminal and a command."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._typed: asyncio.Queue[bytes] = asyncio.Queue()
        self._left = asyncio.Event()
        self._stack = contextlib.ExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "_Terminal":
        self._stack.enter_context(_signals(signal.SIGWINCH, call=self._resized))
        self._stack.enter_context(_signals(signal.SIGTERM, signal.SIGHUP, call=self._told_to_leave))
        self._loop.add_reader(0, self._key)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.remove_reader(0)
        self._stack.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until_end(self) -> ExecResult | None:
        show = self._loop.create_task(self._show())
        give = self._loop.create_task(self._give())
        leave = self._loop.create_task(self._wait_for_leave())
        self._tasks += [show, give, leave]
        self._resized()
        done, _ = await asyncio.wait([show, leave, give], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return await self._process.wait() if show in done else None

    async def _wait_for_leave(self) -> None:
        await self._left.wait()

    async def _show(self) -> None:
        async for _, data in self._process:
            await asyncio.to_thread(_write_all, 1, data)

    async def _give(self) -> None:
        while True:
            await self._process.write(await self._typed.get())

    def _key(self) -> None:
        data = _read_stdin()
        before, detach, _ = data.partition(DETACH_KEY)
        if before:
            self._typed.put_nowait(before)
        if detach or not data:
            self._left.set()

    def _resized(self, _: int = 0) -> None:
        self._tasks.append(self._loop.create_task(self._send_size()))

    async def _send_size(self) -> None:
        with contextlib.suppress(HadalError, ConnectionError):
            await self._process.resize(*_size())

    def _told_to_leave(self, number: int) -> None:
        print(f"\r\nended by {signal.Signals(number).name}\r", file=sys.stderr)  # noqa: T201
        self._left.set()

"""The process around a node: one for each state folder, on a Unix socket, a port, or both."""

import asyncio
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import logging
import os
import resource
import signal
import ssl
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

from aiohttp import web

from hadal.errors import HadalError, NodeError, UnsupportedError
from hadal.node.app import build_node_app
from hadal.node.node import Node
from hadal.node.node_config import NodeConfig

__all__ = ["LOG_FORMAT", "Listen", "log_to_file", "run_daemon"]

logger = logging.getLogger(__name__)
_SHUTDOWN_S = 1
"""For requests under way: what they wait for goes on without us, and their callers ask again."""
_LOG_BYTES = 8 << 20
_LOG_FILES = 3
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def log_to_file(path: Path) -> None:
    """Write the log of this process to a file that does not grow without end."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES - 1)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where a daemon listens.

    Attributes:
        socket: Path of a Unix socket, for this user only.
        host, port: Address and port; 0 for any free one, None for none.
        keys: API keys, of which every request on the port needs one.
        tls: Certificate and key files.
        idle_exit_s: Without boxes and requests for so long it ends; 0 for never.
        ready: File descriptor that is written to and closed when it listens.
    """

    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    keys: frozenset[str] = frozenset()
    tls: tuple[Path, Path] | None = None
    idle_exit_s: float = 0
    ready: int | None = None


@contextlib.contextmanager
def _only_one(state: Path) -> Generator[None]:
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise NodeError(
                f"another node daemon (pid {file.read().strip()}) has the state folder {state}",
                hint="use that one, or choose another folder",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Activity:
    """When the last request came."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.running = 0

    def middleware(self) -> object:
        @web.middleware
        async def note(request: web.Request, handler: object) -> web.StreamResponse:
            self.running += 1
            try:
                return await handler(request)  # pyright: ignore
            finally:
                self.running -= 1
                self.last = time.monotonic()

        return note


async def _serve(config: NodeConfig, listen: Listen) -> None:
    node = Node(config)
    await node.start()
    activity = _Activity()
    runners: list[web.AppRunner] = []
    stop = asyncio.Event()
    end_boxes = False

    def stop_it(with_boxes: bool) -> None:
        nonlocal end_boxes
        end_boxes = with_boxes
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        for keys, at in ((frozenset[str](), "socket"), (listen.keys, "port")):
            app = build_node_app(node, keys=keys, stop=stop_it if at == "socket" else None)
            app.middlewares.insert(0, activity.middleware())  # pyright: ignore
            runner = web.AppRunner(
                app, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_S
            )
            await runner.setup()
            runners.append(runner)
            if at == "socket" and listen.socket is not None:
                listen.socket.unlink(missing_ok=True)
                site: web.BaseSite = web.UnixSite(runner, str(listen.socket))
                await site.start()
                listen.socket.chmod(0o600)
            elif at == "port" and listen.port is not None:
                site = web.TCPSite(runner, listen.host, listen.port, ssl_context=_tls(listen))
                await site.start()
                addresses = [f"{a[0]}:{a[1]}" for a in runner.addresses]
                logger.info("listening on %s", ", ".join(addresses))
        _say_ready(listen, runners[-1])
        await _until_idle(node, activity, listen.idle_exit_s, stop)
    finally:
        for runner in runners:
            await runner.cleanup()
        await node.close(end_boxes=end_boxes)


def _tls(listen: Listen) -> ssl.SSLContext | None:
    if listen.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*listen.tls)
    return context


def _say_ready(listen: Listen, runner: web.AppRunner) -> None:
    if listen.ready is not None:
        port = runner.addresses[0][1] if runner.addresses else 0
        os.write(listen.ready, f"{port}\n".encode())
        os.close(listen.ready)


async def _until_idle(node: Node, activity: _Activity, idle_s: float, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), timeout=1)
        if not idle_s or node.boxes or activity.running:
            activity.last = max(activity.last, time.monotonic() if node.boxes else activity.last)
            continue
        if time.monotonic() - activity.last > idle_s:
            logger.info("nothing to do for %.0f s: ending", idle_s)
            return


_NEW_MOUNTS, _RECURSIVE, _PRIVATE = 0x20000, 1 << 14, 1 << 18


def _leave_host_mounts() -> int:
    """Enter a mount namespace of our own: layers are mounted in it, and go with the last who uses it.

    Before there are threads: each has its own. Returns a file descriptor of the one that is left.
    """
    host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) or libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None):
        raise UnsupportedError(
            f"no mount namespace for the node: {os.strerror(ctypes.get_errno())}",
            hint="run it as root; `hadal doctor` says what each kind of box needs",
        )
    return host


def run_daemon(config: NodeConfig, listen: Listen) -> int:
    """Run a node until it is told to stop; return the exit status."""
    _raise_file_limit()
    try:
        with _only_one(config.state):
            host = _leave_host_mounts()
            gc.set_threshold(50_000, 20, 20)  # thousands of boxes are no garbage
            asyncio.run(_serve(dataclasses.replace(config, host_mounts=host), listen))
    except HadalError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 3
    return 0

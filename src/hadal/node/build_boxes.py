"""Boxes for the `run` steps of a recipe: made, used for one command, and gone.

They have no journal, no limits of their own and no network but the one that is named: whoever builds an
image trusts its recipe as far as a box holds it.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.guest import Guest
from hadal.node.guest_command import CommandOrder, GuestCommand
from hadal.node.guest_program import guest_program
from hadal.node.images.resolved import ResolvedImage
from hadal.node.images.tree import remove_tree
from hadal.node.launcher import Launcher, LaunchRequest

__all__ = ["BuildBoxes"]

_UID_BASE = 1 << 20
_TAIL_BYTES = 2000


class _Output:
    """Passes on what a command writes, and keeps the end of it."""

    def __init__(self, show: Callable[[bytes], None] | None) -> None:
        self.command: GuestCommand | None = None
        self.tail = b""
        self._show = show
        self._ends = {1: 0, 2: 0}

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take what has been written, and let more come."""
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        if self._show is not None:
            self._show(data)
        self._ends[stream] = offset + len(data)
        if self.command is not None:
            self.command.acknowledge(self._ends[1], self._ends[2])


class BuildBoxes:
    """Runs the commands of one build; `run` is a `Runner`.

    Args:
        folder: For what the boxes write.
        show: Takes the output of the commands.
        host_network: Let them use the network of the host.
    """

    def __init__(
        self, folder: Path, show: Callable[[bytes], None] | None, *, host_network: bool
    ) -> None:
        self._folder = folder
        self._show = show
        self._host_network = host_network
        self._launcher = Launcher(guest_program(), self._on_exit)
        self._exits: dict[int, asyncio.Event] = {}
        self._number = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, show: Callable[[bytes], None] | None = None, *, host_network: bool = False
    ) -> AsyncGenerator["BuildBoxes"]:
        """Start what makes the boxes; at the end everything of theirs is gone."""
        folder = Path(tempfile.mkdtemp(prefix="hadal-build-"))
        boxes = cls(folder, show, host_network=host_network)
        boxes._launcher.start()
        try:
            yield boxes
        finally:
            boxes._launcher.close()
            await asyncio.to_thread(remove_tree, folder)

    async def run(self, image: ResolvedImage, command: str) -> Path:
        """Run a command in a fresh box of an image; return what it has changed.

        Raises:
            ImageError: It failed; the end of its output is in the message.
            LaunchError: There is no box.
        """
        self._number += 1
        box = self._folder / str(self._number)
        for name in ("mounts", "scratch"):
            (box / name).mkdir(parents=True)
        etc = await asyncio.to_thread(self._network_files)
        launched = await self._launcher.launch(
            LaunchRequest(
                hostname="build",
                layers=image.layers,
                binds=image.binds,
                run_directory=box / "mounts",
                socket=box / "guest",
                scratch=box / "scratch",
                uid_base=_UID_BASE,
                network=Path("/proc/self/ns/net") if self._host_network else None,
                etc=etc,
            )
        )
        try:
            await self._execute(box / "guest", image, command)
        finally:
            os.kill(launched.pid, signal.SIGKILL)
            await self._exits.setdefault(launched.pid, asyncio.Event()).wait()
        upper = box / "scratch/upper"
        for name in etc:  # ours, not the command's
            (upper / "etc" / name).unlink(missing_ok=True)
        return upper

    def _on_exit(self, pid: int, status: int) -> None:
        self._exits.setdefault(pid, asyncio.Event()).set()

    def _network_files(self) -> dict[str, bytes]:
        if not self._host_network:
            return {}
        files = {name: Path("/etc", name) for name in ("resolv.conf", "hosts")}
        return {name: path.read_bytes() for name, path in files.items() if path.exists()}

    async def _execute(self, socket: Path, image: ResolvedImage, command: str) -> None:
        guest = await Guest.connect(socket)
        try:
            output = _Output(self._show)
            order = CommandOrder(
                arguments=[b"/bin/sh", b"-c", os.fsencode(command)],
                environment=image.config.environment,
                directory=os.fsencode(image.config.working_directory),
                user=image.config.user,
            )
            output.command = guest.execute(1, order, output)
            ended = await output.command.ended
        finally:
            guest.close()
        if ended.status != 0:
            status = os.waitstatus_to_exitcode(ended.status)
            tail = output.tail.decode(errors="replace").strip()
            raise ImageError(f"{command!r:.200} ended with status {status}\n{tail}")

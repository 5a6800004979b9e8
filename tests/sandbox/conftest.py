"""Boxes of the lowest level: a launcher, and a root made of this host's /usr."""

import asyncio
import ctypes
import functools
import os
import signal
import tempfile
from pathlib import Path

import pytest

from hadal.node.guest import Guest
from hadal.node.guest_command import CommandOrder
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore
from hadal.node.images.erofs import can_mount_erofs, unmount
from hadal.node.launcher import Launcher, LaunchRequest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="boxes are made by root")


def names(folder):
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


class Output:
    """Keeps what a command writes; a gap is an error."""

    def __init__(self):
        self.streams = {1: bytearray(), 2: bytearray()}
        self.gaps = []

    def output(self, stream, offset, data):
        if offset != len(self.streams[stream]):
            self.gaps.append((stream, len(self.streams[stream]), offset))
        self.streams[stream] += data


class RawBox:
    """A launched box and its guest, without a node daemon."""

    def __init__(self, guest, pid, folder):
        self.guest = guest
        self.pid = pid
        self.folder = folder
        self.next = 0

    def start(self, *arguments, **order):
        self.next += 1
        output = Output()
        encoded = [os.fsencode(a) for a in arguments]
        return self.guest.execute(
            self.next, CommandOrder(arguments=encoded, **order), output
        ), output

    async def run(self, *arguments, **order):
        command, output = self.start(*arguments, **order)
        ended = await command.ended
        command.forget()
        return ended, bytes(output.streams[1]), bytes(output.streams[2])

    async def shell(self, text, **order):
        return await self.run("/bin/sh", "-c", text, **order)


@pytest.fixture
def rootfs(tmp_path):
    root = tmp_path / "rootfs"
    for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "root", "var", "run", "home"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home:/bin/sh\n"
    )
    (root / "etc/group").write_text("root:x:0:\nada:x:1000:\nstaff:x:50:ada\n")
    return root


@pytest.fixture
def with_box(rootfs, tmp_path):
    """Run a coroutine function with a fresh box, made with these changes to the request."""

    def run(body, **changes):
        async def main():
            exits = asyncio.Queue()
            launcher = Launcher(
                guest_program(), lambda pid, status: exits.put_nowait((pid, status))
            )
            launcher.start()
            folder = tmp_path / "box"
            for name in ("mounts", "scratch"):
                (folder / name).mkdir(parents=True)
            request = {
                "hostname": "box",
                "layers": (rootfs,),
                "run_directory": folder / "mounts",
                "socket": folder / "guest",
                "scratch": folder / "scratch",
                "uid_base": 1 << 20,
                "binds": ((Path("/usr"), "/usr", True),),
                "limits": ("core=1:1",),
            } | changes
            try:
                launched = await launcher.launch(LaunchRequest(**request))
                guest = await Guest.connect(folder / "guest")
                box = RawBox(guest, launched.pid, folder)
                try:
                    await body(box)
                finally:
                    guest.close()
                    os.kill(launched.pid, signal.SIGKILL)
                    assert await asyncio.wait_for(exits.get(), 10) == (launched.pid, signal.SIGKILL)
            finally:
                launcher.close()

        asyncio.run(main())

    return run


@pytest.fixture(params=["erofs", "directories"])
def erofs(request):
    """Both forms that layers are kept in."""
    if request.param == "erofs" and not _has_erofs():
        pytest.skip(
            "EROFS images cannot be made and mounted here: no erofs-utils, or an old kernel"
        )
    return request.param == "erofs"


@functools.cache
def _has_erofs():
    with tempfile.TemporaryDirectory() as folder:
        return can_mount_erofs(Path(folder))


@pytest.fixture
def open_store(tmp_path):
    """Open stores; at the end nothing of theirs is mounted."""
    roots = set()

    def open_one(root=tmp_path / "store", **settings):
        roots.add(root)
        return ImageStore(root, **settings)

    yield open_one
    for root in roots:
        for point in (root / "mounts").glob("*"):
            unmount(point)


@pytest.fixture
def store(open_store, erofs):
    return open_store(erofs=erofs)


@pytest.fixture
def merged(tmp_path):
    """Mount the layers of an image over each other, as a box sees them; read only."""
    libc = ctypes.CDLL(None, use_errno=True)
    points = []

    def mount(image):
        if len(image.layers) == 1:
            return image.layers[0]
        point = tmp_path / f"merged-{len(points)}"
        point.mkdir()
        points.append(point)
        options = "lowerdir=" + ":".join(map(str, image.layers))
        status = libc.mount(b"overlay", os.fsencode(point), b"overlay", 1, options.encode())
        assert status == 0, os.strerror(ctypes.get_errno())
        return point

    yield mount
    for point in points:
        unmount(point)

"""Ends or fails an operation of the image store at each of its steps, and looks at what is left.

    python -m tests.sandbox.crash_driver OPERATION FAULT FORM ROOT STRIDE

A step is whatever the operation does to files of the store, as Python's audit events tell; FAULT is `kill`
(SIGKILL), `full` (ENOSPC) or `time` (SIGKILL after some milliseconds, in children too late to be seen by
audit events). Each try is a fork of this process, which has imported everything. Prints the number of tries.
"""

import asyncio
import errno
import os
import random
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path

from hadal.errors import ImageError
from hadal.node.images import ImageStore, RegistrySettings
from tests.sandbox.image_files import small_image
from tests.sandbox.registry_server import RegistryServer

CHANGING = {
    "fcntl.flock",
    "os.chown",
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.symlink",
    "os.utime",
    "subprocess.Popen",
}
NEVER_FULL = {"fcntl.flock", "os.remove", "os.rmdir", "subprocess.Popen"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DONE, FULL, SURVIVED = 0, 3, 4


def arm(fault, at):
    """Let the step with this number fail; return a function that says whether it came to that."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            event = "os.mkdir"
        if event not in CHANGING or (fault == "full" and event in NEVER_FULL):
            return
        count += 1
        if count == at:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "time":
        threading.Timer(at / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        sys.addaudithook(hook)
    return lambda: count >= at


async def operate(store, operation, source, host):
    match operation:
        case "pull":
            await store.pull(f"{host}/library/tool:1")
        case "import":
            await store.import_directory(source / "tree", "tree")
        case "archive":
            await store.import_archive(source / "archive")
        case "commit":
            async with store.using(source / "tree") as base:
                await store.commit(source / "upper", base, name="snap")


def make_sources(source):
    for name in ("tree", "upper"):
        (source / name / "a/b").mkdir(parents=True)
        (source / name / "a/b/file").write_bytes(name.encode() * 1000)
        (source / name / "link").symlink_to("a")
    os.mknod(source / "upper/gone", stat.S_IFCHR, 0)
    os.setxattr(source / "upper/a", "trusted.overlay.opaque", b"y")
    (source / "archive").write_bytes(small_image().docker_save())


def listing(root):
    """Names, kinds and contents."""
    found = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found.append((str(path.relative_to(root)), status.st_mode, content))
    return found


async def contents(store):
    """What every image of the store is made of; all of it can be used."""
    found = {}
    for record in await store.list():
        async with store.using(record.name) as image:
            found[record.name] = [listing(layer) for layer in image.layers]
    return found


async def inspect(store, expected):
    """See that what is there is whole, and that after pruning nothing else is."""
    found = await contents(store)
    assert found in ({}, expected), f"neither nothing nor everything: {list(found)}"
    await store.prune()
    assert await contents(store) == found
    for _ in range(200):  # a program that the dead process started may not have ended yet
        await store.prune()
        if not list((store.root / "staging").iterdir()):
            break
        await asyncio.sleep(0.02)
    for folder in ("staging", "mounts"):
        assert not list((store.root / folder).iterdir()), folder
    layers = {layer for record in await store.list() for layer in record.layers}
    assert {f"sha256:{p.stem}" for p in (store.root / "layers").iterdir()} == {
        layer for layer in layers if layer.startswith("sha256:")
    }
    for record in await store.list():
        await store.remove(record.name)
    await store.prune()
    assert not list((store.root / "layers").iterdir())


def fork(work):
    """Run something in a child; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            status = work()
        except BaseException:  # noqa: BLE001 - it ends here
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def serve(port_file):
    server = RegistryServer()
    server.add(small_image())

    async def main():
        async with server.running():
            port_file.write_text(server.host)
            await asyncio.sleep(3600)

    asyncio.run(main())


def drive(operation, fault, form, root, stride):
    source = root / "source"
    make_sources(source)
    registry = RegistrySettings(retry_delay_s=0.001, attempts=1)

    def open_store():
        return ImageStore(root / "store", erofs=form == "erofs", registry=registry)

    def attempt(at):
        came = arm(fault, at)
        store = None
        try:
            store = open_store()
            asyncio.run(operate(store, operation, source, host))
        except ImageError as error:
            if "No space left" not in str(error):
                raise
            if store is not None:
                store._layers.settle()
                assert not list((store.root / "staging").iterdir()), "left after a full disk"
            return FULL
        return SURVIVED if came() else DONE

    server = os.fork()
    if server == 0:
        serve(root / "host")
    try:
        while not (root / "host").exists() or not (root / "host").read_text():
            time.sleep(0.01)
        host = (root / "host").read_text()

        async def expect():
            store = ImageStore(root / "expected", erofs=form == "erofs", registry=registry)
            await operate(store, operation, source, host)
            found = await contents(store)
            await store.prune()
            return found

        expected = asyncio.run(expect())
        delays = random.Random(1)
        at = tries = 0
        while True:
            at = delays.randrange(1, 40) if fault == "time" else at + stride
            status = fork(lambda: attempt(at))  # noqa: B023 - run at once
            assert status in (DONE, FULL, SURVIVED, -signal.SIGKILL), (at, status)
            tries += 1
            checked = fork(lambda: asyncio.run(inspect(open_store(), expected)) or 0)
            assert checked == 0, (at, status)
            if (status == DONE and fault != "time") or tries == stride * (fault == "time"):
                return tries
    finally:
        os.kill(server, signal.SIGKILL)


if __name__ == "__main__":
    given = sys.argv[1:]
    print(drive(*given[:3], Path(given[3]), int(given[4])))  # noqa: T201

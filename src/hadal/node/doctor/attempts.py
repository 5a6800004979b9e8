"""What the probes try, each in a process of its own: `python -m hadal.node.doctor.attempts NAME ARGUMENTS`.

Every function returns what it saw, or raises. The process ends afterwards, and its namespaces with it.
"""

import ctypes
import errno
import json
import os
import signal
import struct
import sys
from pathlib import Path

from hadal.errors import HadalError
from hadal.node.doctor import disk_attempts, system_calls
from hadal.node.machines.kvm import run_guest

__all__ = ["main"]

_ALLOCATED = 128 << 20
_LIMIT = 32 << 20
_PIDS = 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_SYS_GETPPID = {"x86_64": 110}


def namespaces() -> str:
    """Enter each kind of namespace."""
    failed: list[str] = []
    for kind in system_calls.CLONE:
        child = os.fork()
        if child == 0:
            try:
                system_calls.unshare(kind)
            except OSError:
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            failed.append(kind)
    if failed:
        raise OSError(f"cannot be entered: {', '.join(failed)}")
    return ", ".join(system_calls.CLONE)


def limits(name: str) -> str:
    """See that a limit of memory kills and one of processes refuses."""
    from hadal.node.cgroups import BoxLimits, Cgroups

    groups = Cgroups(name)
    group = groups.of("probe")
    try:
        group.create(BoxLimits(memory_bytes=_LIMIT, cpus=1, pids=_PIDS))
        if not os.WIFSIGNALED(_in_group(group.procs, _allocate)):
            raise OSError(f"a limit of {_LIMIT >> 20} MiB let {_ALLOCATED >> 20} MiB through")
        if os.waitstatus_to_exitcode(_in_group(group.procs, _fork_many)) != errno.EAGAIN:
            raise OSError(f"a limit of {_PIDS} processes let more through")
    finally:
        group.remove()
        for folder in group.folders:
            for parent in (folder.parent, folder.parent.parent):
                try:
                    parent.rmdir()
                except OSError:  # another node's
                    break
    return f"{groups.layout}; memory and processes are held to their limits"


def _in_group(procs: tuple[Path, ...], work: object) -> int:
    child = os.fork()
    if child == 0:
        for file in procs:
            file.write_text("0", encoding="ascii")
        assert callable(work)
        os._exit(int(work() or 0))  # pyright: ignore
    return os.waitpid(child, 0)[1]


def _allocate() -> int:
    kept = bytearray(_ALLOCATED)
    return kept[-1]


def _fork_many() -> int:
    children: list[int] = []
    refused = 0
    for _ in range(4 * _PIDS):
        try:
            child = os.fork()
        except OSError as error:
            refused = error.errno or 1
            break
        if child == 0:
            signal.pause()
        children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return refused


def seccomp() -> str:
    """Install a filter that refuses one call, and make it."""
    number = _SYS_GETPPID.get(os.uname().machine, 173)
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the number of the call
            (0x15, 0, 1, number),
            (0x06, 0, 0, 0x00050000 | errno.EPERM),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = system_calls.libc
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0):
        raise OSError(os.strerror(ctypes.get_errno()))
    if libc.syscall(number) != -1 or ctypes.get_errno() != errno.EPERM:
        raise OSError("the filter is installed and filters nothing")
    return "a filter refuses what it should"


def networks() -> str:
    """Make what networks of boxes are made of."""
    from hadal.node.network import probe

    found = probe()
    for finding in found:
        if not finding.works:
            raise OSError(f"{finding.what}: {finding.detail} ({finding.hint})")
    return "; ".join(f"{finding.what}: {finding.detail}" for finding in found)


def kvm() -> str:
    """Run instructions of a guest."""
    return run_guest()


def box(folder: str) -> str:
    """Make a box by a node of its own, run a command in it, and end it."""
    import asyncio
    import time

    from hadal.node.node import Node
    from hadal.node.node_config import NodeConfig
    from hadal.sandbox.protocol import CommandRequest, CreateRequest

    system_calls.own_mounts()  # as the daemon does

    async def work() -> str:
        state = Path(folder)
        config = NodeConfig(state=state, name=f"doctor-{os.getpid()}", lease_s=5)
        node = Node(config)
        await node.start()
        try:
            began = time.monotonic()
            spec = {"backend": "container"}
            made = await node.create(CreateRequest(spec=spec, request_id="probe"))
            command = await made.start(CommandRequest(argv=("/usr/bin/true",), request_id="probe"))
            code = (await command.result).exit_code
            elapsed = 1000 * (time.monotonic() - began)
        finally:
            await node.close(end_boxes=True)
        if code:
            raise OSError(f"`true` ended with exit code {code}")
        return f"made one and ran a command in it in {elapsed:.0f} ms"

    return asyncio.run(work())


_ATTEMPTS = {
    function.__name__: function for function in (namespaces, limits, seccomp, networks, kvm, box)
} | disk_attempts.ATTEMPTS


def main() -> None:
    """Do one and say how it went, as JSON."""
    name, *arguments = sys.argv[1:]
    try:
        body = {"ok": True, "detail": _ATTEMPTS[name](*arguments)}
    except (OSError, HadalError) as error:
        text = error.message if isinstance(error, HadalError) else error.strerror or str(error)
        body = {"ok": False, "detail": text}
    sys.stdout.write(json.dumps(body))


if __name__ == "__main__":
    main()

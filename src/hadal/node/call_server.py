"""Runs calls inside a box of functions: this file is the program there, so it needs nothing but Python.

It reads calls from standard input and answers on standard output, each as `u32 length | JSON`. Every call
runs in a child of its own, forked from here before it is needed, with the modules already imported, as
another user: it cannot reach this process. Afterwards all that user's processes are killed and the writable
directories emptied, so that the next call finds what the first one found.
"""

import base64
import contextlib
import importlib
import itertools
import json
import os
import select
import signal
import struct
import sys
import time
import traceback
from typing import Any

__all__ = ["main"]

CALLER = 1000
"""User of the calls."""
KILLER = 65533
"""Real user of this process while it kills: nobody else has it, so only callers are killed."""
SCRATCH = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/home/call")
KEPT = 1 << 20
"""Bytes of output of a call that are kept, each stream."""
RESULT = 16 << 20
"""Bytes of a result, at most."""


def read_exactly(fd: int, length: int) -> bytes | None:
    """Return so many bytes, or None at the end."""
    parts: list[bytes] = []
    while length:
        part = os.read(fd, min(length, 1 << 20))
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def receive(fd: int = 0) -> bytes | None:
    """Return the next message, or None at the end."""
    header = read_exactly(fd, 4)
    return None if header is None else read_exactly(fd, struct.unpack("<I", header)[0])


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def send(message: dict[str, Any]) -> None:
    """Say something to the node."""
    body = json.dumps(message).encode()
    write_all(1, struct.pack("<I", len(body)) + body)


def become_caller() -> None:
    """Give up every privilege for good."""
    os.setgroups([])
    os.setresgid(CALLER, CALLER, CALLER)
    os.setresuid(CALLER, CALLER, CALLER)


def arguments_of(call: dict[str, Any]) -> Any:
    """Return the positional and named arguments."""
    if call["pickled"]:
        import pickle

        return pickle.loads(base64.b64decode(call["arguments"]))
    return call["arguments"]


def perform(call: dict[str, Any], result: int) -> None:
    """In the child: run it and write how it went into a pipe."""
    become_caller()
    os.chdir("/home/call")
    os.environ.update(HOME="/home/call", USER="call")
    names: dict[str, Any] = {"__name__": "__call__"}
    try:
        exec(compile(call["source"], "<call>", "exec"), names)
        positional, named = arguments_of(call)
        value = names[call["name"]](*positional, **named)
        if call["pickled"]:
            import pickle

            answer = {"pickle": base64.b64encode(pickle.dumps(value)).decode()}
        else:
            answer = {"value": value}
        body = json.dumps(answer).encode()
    except BaseException as error:
        text = "".join(traceback.format_exception(error))[-16384:]
        body = json.dumps(
            {"error": type(error).__name__, "message": str(error)[:4096], "trace": text}
        ).encode()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        write_all(result, body)
        os.close(result)  # this is heard before the process has gone


class Child:
    """A process that waits for a call."""

    def __init__(self) -> None:
        order, *answers = [os.pipe() for _ in range(4)]
        ours = (order[1], *(read for read, _ in answers))
        theirs = (order[0], *(write for _, write in answers))
        self.pid = os.fork()
        for fd in theirs if self.pid else ours:
            os.close(fd)
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                wait_for_call(*theirs)
            os._exit(0)
        self.order, *self.pipes = ours

    def give(self, body: bytes) -> None:
        """Give it its call. Where something has killed it meanwhile, the answer says so."""
        with contextlib.suppress(BrokenPipeError):
            write_all(self.order, struct.pack("<I", len(body)) + body)
        os.close(self.order)


def wait_for_call(order: int, result: int, out: int, err: int) -> None:
    """In the child: wait, and run the call."""
    os.setsid()
    body = receive(order)
    if body is None:
        return
    for fd, target in ((os.open("/dev/null", os.O_RDONLY), 0), (out, 1), (err, 2), (result, 3)):
        os.dup2(fd, target)
    os.closerange(4, 65536)
    perform(json.loads(body), 3)


def kill_callers() -> None:
    """Kill whatever the user of calls has left, wherever it hides: a fork cannot outrun a kill of all.

    They cannot kill this process first, as they could one of their own user.
    """
    os.setresuid(KILLER, CALLER, 0)
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    finally:
        os.setresuid(0, 0, 0)


def end_callers() -> None:
    """Return when nothing of the user of calls runs any more: what was killed takes a moment to go."""
    while callers_left():
        kill_callers()
        time.sleep(0.0005)


def callers_left() -> bool:
    """Return whether a process of the user of calls is there."""
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == CALLER:
                return True
    return False


def collect(pid: int, pipes: list[int], deadline: float) -> tuple[list[bytes], int, bool]:
    """Read result and output until the child has told its result or ended, or its time is over.

    Returns:
        Result, output and errors; the wait status of the child where it told nothing; and whether it was late.
    """
    kept = {fd: bytearray() for fd in pipes}
    limits = dict(zip(pipes, (RESULT, KEPT, KEPT), strict=True))
    child = os.pidfd_open(pid)
    waiting = {*pipes, child}
    late = False
    while child in waiting and not (kept[pipes[0]] and pipes[0] not in waiting):
        left = deadline - time.monotonic()
        late = left <= 0
        if late:
            break
        for fd in select.select(list(waiting), [], [], left)[0]:
            if fd == child or not take(fd, kept[fd], limits[fd]):
                waiting.discard(fd)
    os.kill(pid, signal.SIGKILL)  # a late one may not be a caller yet
    kill_callers()
    status = 0 if kept[pipes[0]] else os.waitpid(pid, 0)[1]
    for fd in pipes:
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while take(fd, kept[fd], limits[fd]):
                pass
    for fd in (*pipes, child):
        os.close(fd)
    return [bytes(kept[fd]) for fd in pipes], status, late


def take(fd: int, kept: bytearray, limit: int) -> bool:
    """Read a little; False at the end. What is beyond the limit is dropped."""
    part = os.read(fd, 1 << 16)
    kept += part[: max(0, limit - len(kept))]
    return bool(part)


def clean() -> None:
    """Empty what a call may write."""
    for folder in SCRATCH:
        empty(folder)
    remove_shared_memory()


def empty(folder: str) -> None:
    """Remove everything in a directory, however deep: what lies deeper is moved up first."""
    numbers = itertools.count()
    while entries := os.listdir(folder):
        for name in entries:
            path = f"{folder}/{name}"
            if not is_directory(path):
                os.unlink(path)
                continue
            for inner in os.listdir(path):
                if is_directory(f"{path}/{inner}"):
                    os.rename(f"{path}/{inner}", unused(folder, numbers))
                else:
                    os.unlink(f"{path}/{inner}")
            os.rmdir(path)


def is_directory(path: str) -> bool:
    """Return whether it is one itself, and no link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def unused(folder: str, numbers: "itertools.count[int]") -> str:
    """Return a path in a directory that is not there."""
    return next(p for n in numbers if not os.path.lexists(p := f"{folder}/{n}"))


def remove_shared_memory() -> None:
    """Remove System V objects, which outlive their processes."""
    import ctypes

    for kind, remove in (("shm", "shmctl"), ("msg", "msgctl")):
        with open(f"/proc/sysvipc/{kind}", encoding="ascii") as lines:
            for line in list(lines)[1:]:
                getattr(ctypes.CDLL(None), remove)(int(line.split()[1]), 0, None)
    with open("/proc/sysvipc/sem", encoding="ascii") as lines:
        for line in list(lines)[1:]:
            ctypes.CDLL(None).semctl(int(line.split()[1]), 0, 0)


def run(child: Child, body: bytes) -> None:
    """Run one call and answer it."""
    began = time.monotonic()
    child.give(body)
    deadline = began + json.loads(body)["timeout_s"]
    (said_bytes, out, err), status, late = collect(child.pid, child.pipes, deadline)
    answer: dict[str, Any] = {
        "stdout": base64.b64encode(out).decode(),
        "stderr": base64.b64encode(err).decode(),
    }
    answer |= {"duration_s": time.monotonic() - began, "timed_out": late}
    try:
        said = json.loads(said_bytes)
        # What the call said of itself, and nothing of what we say of it.
        answer |= {
            k: said[k] for k in ("value", "pickle", "error", "message", "trace") if k in said
        }
    except (ValueError, TypeError, RecursionError):
        how = "it took too long" if late else f"it ended with status {status:#x} and no result"
        answer |= {"error": "CallEnded", "message": how, "signal": os.WTERMSIG(status) or None}
    send(answer)


def main() -> None:
    """Serve calls until the input ends."""
    again, *preload = sys.argv[1:]
    for folder in SCRATCH:
        os.makedirs(folder, exist_ok=True)
    os.chown("/home/call", CALLER, CALLER)
    if again == "again":  # an interpreter before this one has died in the middle
        end_callers()
        clean()
    for module in preload:
        importlib.import_module(module)
    child = Child()
    send({"ready": True})
    while (body := receive()) is not None:
        run(child, body)
        with contextlib.suppress(ChildProcessError):  # waited for already
            os.waitpid(child.pid, 0)
        end_callers()
        clean()
        child = Child()


if __name__ == "__main__":
    main()

"""Runs calls inside a box of functions: this file is the program there, so it needs nothing but Python.

It reads calls from standard input and answers on standard output, each as `u32 length | JSON`. Every call
runs in a child of its own, forked from here with the modules already imported, as another user: it cannot
reach this process. Afterwards all that user's processes are killed and the writable directories emptied,
so that the next call finds what the first one found.
"""

import base64
import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import struct
import sys
import time
import traceback
from typing import Any

__all__ = ["main"]

CALLER = 1000
"""User of the calls."""
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


def receive() -> dict[str, Any] | None:
    """Return the next call, or None at the end."""
    header = read_exactly(0, 4)
    body = None if header is None else read_exactly(0, struct.unpack("<I", header)[0])
    return None if body is None else json.loads(body)


def send(answer: dict[str, Any]) -> None:
    """Answer a call."""
    body = json.dumps(answer).encode()
    data = struct.pack("<I", len(body)) + body
    while data:
        data = data[os.write(1, data) :]


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
        while body:
            body = body[os.write(result, body) :]


def start(call: dict[str, Any]) -> tuple[int, list[int]]:
    """Fork the child of a call; return its pid and the pipes with its result and its output."""
    pipes = [os.pipe() for _ in range(3)]
    pid = os.fork()
    if pid:
        for _, write in pipes:
            os.close(write)
        return pid, [read for read, _ in pipes]
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        for old, new in ((null, 0), (pipes[1][1], 1), (pipes[2][1], 2), (pipes[0][1], 3)):
            os.dup2(old, new)
        os.closerange(4, 65536)
        perform(call, 3)
    finally:
        os._exit(0)


def kill_callers() -> None:
    """Kill whatever the user of calls has left, wherever it hides: a fork cannot outrun a kill of all."""
    pid = os.fork()
    if pid == 0:
        become_caller()
        os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(pid, 0)


def collect(pid: int, pipes: list[int], deadline: float) -> tuple[list[bytes], int, bool]:
    """Read result and output until the child has ended, or its time has; return them and whether late."""
    kept = {fd: bytearray() for fd in pipes}
    limits = dict(zip(pipes, (RESULT, KEPT, KEPT), strict=True))
    child = os.pidfd_open(pid)
    waiting = {*pipes, child}
    late = False
    while child in waiting:
        left = deadline - time.monotonic()
        late = left <= 0
        if late:
            break
        for fd in select.select(list(waiting), [], [], left)[0]:
            if fd == child:
                waiting.discard(child)
            elif not take(fd, kept[fd], limits[fd]):
                waiting.discard(fd)
    kill_callers()
    _, status = os.waitpid(pid, 0)
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
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
    remove_shared_memory()


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


def run(call: dict[str, Any]) -> None:
    """Run one call and answer it."""
    began = time.monotonic()
    pid, pipes = start(call)
    (body, out, err), status, late = collect(pid, pipes, began + call["timeout_s"])
    answer: dict[str, Any] = {
        "stdout": base64.b64encode(out).decode(),
        "stderr": base64.b64encode(err).decode(),
    }
    answer |= {"duration_s": time.monotonic() - began, "timed_out": late}
    try:
        said = json.loads(body)
        # What the call said of itself, and nothing of what we say of it.
        answer |= {
            k: said[k] for k in ("value", "pickle", "error", "message", "trace") if k in said
        }
    except (ValueError, TypeError, RecursionError):
        how = "it took too long" if late else f"it ended with status {status:#x} and no result"
        answer |= {"error": "CallEnded", "message": how, "signal": os.WTERMSIG(status) or None}
    send(answer)
    clean()


def main() -> None:
    """Serve calls until the input ends."""
    for folder in SCRATCH:
        os.makedirs(folder, exist_ok=True)
    os.chown("/home/call", CALLER, CALLER)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    send({"ready": True})
    while (call := receive()) is not None:
        run(call)


if __name__ == "__main__":
    main()

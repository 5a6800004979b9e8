"""Calls of functions: results, failures, and nothing left of an earlier call."""

import time

from hadal.errors import CallFailedError, LaunchError
from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, expect, holds

__all__ = ["death", "failures", "fresh_boxes", "nothing_is_left", "values"]


@check(Capability.CALL)
def values(make: MakeBox) -> None:
    """Arguments go in and values come out, as JSON or pickled."""
    with make() as box:
        equal(box.call("def f(a, b=1): return [a, b, {'k': None}]", ("é",), {"b": 2.5}).value,
              ["é", 2.5, {"k": None}])  # fmt: skip
        result = box.call("def f(x): return x | {3}", ({1, 2},), pickled=True)
        holds(isinstance(result.pickle, bytes), "a pickled result comes as bytes")
        again = box.call("def f(x): return sorted(x)", (result.pickle,), pickled=True)
        holds(again.ok, again.message)
        printed = box.call("def f():\n import sys\n print('out')\n print('err', file=sys.stderr)")
        equal((printed.stdout, printed.stderr, printed.value), ("out\n", "err\n", None))


@check(Capability.CALL)
def failures(make: MakeBox) -> None:
    """Whatever ends a call is a value with a name, and the next call works."""
    with make() as box:
        failed = box.call("def f(): return {}['k']")
        equal((failed.error, failed.message, failed.ok), ("KeyError", "'k'", False))
        holds("line 1" in failed.trace, "there is no trace")
        with expect(CallFailedError):
            _ = failed.value
        for source in (
            "def f():\n import os\n os._exit(3)",
            "def f():\n import os\n os.kill(os.getpid(), 9)",
            "def f(): return object()",
            "def f():\n import os\n os.close(3)",
            "def f():\n import os\n os.write(3, b'garbage')\n os._exit(0)",
        ):
            holds(not box.call(source).ok, f"it returned: {source}")
        began = time.monotonic()
        late = box.call("def f():\n while True: pass", timeout_s=0.5)
        equal((late.timed_out, late.error), (True, "CallEnded"))
        holds(time.monotonic() - began < 2, "the time did not hold")
        equal(box.call("def f(): return 1").value, 1)


@check(Capability.CALL)
def death(make: MakeBox) -> None:
    """An interpreter that dies fails the call that it had, and the next call has another one."""
    kill = """
import os
for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    if pid not in (1, os.getpid()): os.kill(pid, 9)
"""
    deep = """
def f():
    import os
    for path in ("/tmp", "/dev/shm"):
        os.chdir(path)
        for _ in range(3000): os.mkdir("d"); os.chdir("d")
"""
    with make() as box:
        holds(box.call(deep).ok, "it cannot make directories")
        equal(
            box.call(
                "def f():\n import os\n return os.listdir('/tmp') + os.listdir('/dev/shm')"
            ).value,
            [],
        )
        holds(box.run(["python3", "-c", kill]).ok, "it cannot kill")
        with expect(LaunchError):
            box.call("def f(): return 1")
        equal(box.call("def f(): return 2").value, 2)


@check(Capability.CALL)
def nothing_is_left(make: MakeBox) -> None:
    """A call finds no file, process, variable or memory of an earlier one."""
    dirty = """
def f():
    import builtins, os, subprocess, sys
    for path in ("/tmp/x", "/var/tmp/x", "/dev/shm/x", "/home/call/x"):
        os.makedirs(path); open(path + "/y", "w").write("y")
    builtins.left = sys.left = 1
    os.environ["LEFT"] = "1"
    for i in range(5):
        subprocess.Popen(["sleep", "60"], start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        while True:
            if os.fork(): os._exit(0)
    refused = 0
    for path in ("/x", "/etc/x", "/usr/x", "/home/x"):
        try: open(path, "w")
        except OSError: refused += 1
    return refused
"""
    look = """
def f():
    import builtins, os, sys
    files = [p for p in ("/tmp", "/var/tmp", "/dev/shm", "/home/call") if os.listdir(p)]
    names = hasattr(builtins, "left") or hasattr(sys, "left") or "LEFT" in os.environ
    mine = [p for p in os.listdir("/proc") if p.isdigit() and os.stat("/proc/" + p).st_uid == os.getuid()]
    return files, names, len(mine)
"""
    with make(pids=256) as box:
        equal(box.call(dirty).value, 4)
        equal(box.call(look).value, [[], False, 1])


@check(Capability.CALL)
def fresh_boxes(make: MakeBox) -> None:
    """A call may ask for a box that nobody has used."""
    with make() as box:
        name = "def f():\n import socket\n return socket.gethostname()"
        names = {str(box.call(name, fresh=fresh).value) for fresh in (False, True, True)}
        equal(len(names), 3)
        holds(box.id in names, "the usual call runs in the box itself")

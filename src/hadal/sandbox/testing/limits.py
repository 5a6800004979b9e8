"""Limits that hold, and say that they did."""

import time

from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, holds

__all__ = [
    "a_busy_neighbour",
    "disk",
    "memory",
    "nothing_of_the_host",
    "open_files",
    "processes",
    "processor",
]


@check()
def memory(make: MakeBox) -> None:
    """Memory beyond the limit ends the command, by name; the box lives."""
    with make(memory_mb=128) as box:
        result = box.run("head -c 300000000 /dev/zero | tail", timeout_s=30)
        holds(result.oom_killed, f"not told as out of memory: {result}")
        equal(box.run("echo on").stdout, "on\n")
        holds(not box.run("exit 1").oom_killed, "a later failure is told as out of memory")
        holds(box.usage().oom_kills > 0, "what was killed is not counted")
        holds(box.usage().memory_bytes <= 128 << 20, "more memory than allowed")


@check()
def processes(make: MakeBox) -> None:
    """A fork bomb meets its limit; the box can be used again when it is over."""
    with make(pids=64) as box:
        result = box.run("i=0; while [ $i -lt 200 ]; do sleep 20 & i=$((i+1)); done", timeout_s=20)
        holds("fork" in result.stderr.lower(), f"nothing was refused: {result}")
        holds(box.usage().pids <= 64, "more processes than allowed")


@check()
def open_files(make: MakeBox) -> None:
    """The number of open files is limited."""
    with make(nofile=64) as box:
        equal(box.run("ulimit -n").stdout, "64\n")


@check(Capability.DISK)
def disk(make: MakeBox) -> None:
    """What a box can write is limited, in bytes and in files; the host's disk is safe."""
    with make(disk_mb=32, inodes=512) as box:
        result = box.run("head -c 100000000 /dev/zero > /home/f")
        holds("No space left" in result.stderr, f"nothing was refused: {result}")
        size = box.files.stat("/home/f").size
        holds(30 << 20 < size <= 33 << 20, f"{size:,} bytes of 32 MiB were written")
        holds(box.usage().disk_bytes >= size, "what is written is not counted")
        box.run("rm /home/f; sync")
        result = box.run("i=0; while [ $i -lt 1000 ]; do : > /home/$i || exit 9; i=$((i+1)); done")
        equal(result.exit_code != 0, True, "a thousand files, where 512 are allowed")
        equal(box.run("rm -f /home/*; echo free > /home/f && cat /home/f").stdout, "free\n")


@check(slow=True)
def processor(make: MakeBox) -> None:
    """Processor time follows the quota."""
    with make(cpus=0.2) as box:
        before = box.usage().cpu_s
        box.run("while :; do :; done", timeout_s=3)
        share = (box.usage().cpu_s - before) / 3
        holds(0.12 < share < 0.28, f"a share of {share:.3f} of a processor, where 0.2 is allowed")


@check()
def nothing_of_the_host(make: MakeBox) -> None:
    """Processes, mounts and network of the host are not there."""
    with make() as box:
        # Threads of a kernel of its own have no command line.
        count = int(box.run("grep -la . /proc/[0-9]*/cmdline | wc -l").stdout)
        holds(count < 8, f"{count} processes in a new box")
        equal(box.run("cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' \\n'").stdout, "lo")
        equal(box.run("hostname").stdout.strip(), box.id)


@check()
def a_busy_neighbour(make: MakeBox) -> None:
    """A box that does all it can leaves the others able to work."""
    with make(memory_mb=128, pids=128, cpus=0.5) as busy, make() as other:
        busy.spawn("while :; do (yes > /dev/null &) ; done", timeout_s=20)
        busy.spawn("yes", output_limit=1000)
        busy.spawn("head -c 500000000 /dev/zero | tail")
        time.sleep(0.5)
        began = time.monotonic()
        equal(other.run("echo works").stdout, "works\n")
        holds(time.monotonic() - began < 2, "the neighbour cannot work")

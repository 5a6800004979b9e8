"""Boxes: how fast they start, answer and multiply, beside the programs that people use for it today.

Every side makes the same thing: a root file system of this host's /usr, read-only, with its own network,
process, mount, IPC and host name space, and runs `true` in it. What a side leaves out is in the notes.
"""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from hadal.bench.memory_in_use import settled_bytes
from hadal.bench.report import Report, Spread
from hadal.sandbox import AsyncSandbox, ContainerSpec, FunctionSpec

__all__ = ["measure"]

_MIB = 1 << 20
_SMALL = ContainerSpec(memory_mb=64, disk_mb=64, inodes=1024, pids=64)
Action = Callable[[], Awaitable[None]]


def measure(rounds: int, live: list[int], *, swe_rex: Path | None = None) -> Report:
    """Measure everything on a node of its own.

    Args:
        rounds: Of every figure with a spread.
        live: Boxes that live while creations are counted, growing.
        swe_rex: Python of an environment with swe-rex, to run its local runtime beside.
    """
    with tempfile.TemporaryDirectory(prefix="hb") as home:
        before = os.environ.get("HADAL_HOME")
        os.environ["HADAL_HOME"] = home
        try:
            return asyncio.run(_measure(rounds, live, Path(home), swe_rex))
        finally:
            os.environ.pop("HADAL_HOME") if before is None else os.environ.update(HADAL_HOME=before)


async def _measure(rounds: int, live: list[int], home: Path, swe_rex: Path | None) -> Report:
    report = Report("boxes: create, execute, fork, call, come back (ms unless it says otherwise)")
    with ExitStack() as stack:
        await _first_results(report, rounds, home, stack, swe_rex)
    await _in_a_box(report, rounds)
    await _coming_back(report, min(2000, 100 * rounds))
    for count in sorted(live):
        await _many(report, count)
    report.notes.append(
        "ours: own user namespace, seccomp, cgroups, a disk of its own, a record in the journal before and"
        " after each command; the peers here: no seccomp, no disk, no journal; bwrap: no cgroup;"
        " swe-rex local: no isolation at all"
    )
    return report


# --- from nothing to the first result ---


async def _first_results(
    report: Report, rounds: int, home: Path, stack: ExitStack, swe_rex: Path | None
) -> None:
    without_end: list[float] = []

    async def ours() -> None:
        start = time.perf_counter()
        async with await AsyncSandbox.create(_SMALL) as box:
            await box.run(["true"])
            without_end.append(1e3 * (time.perf_counter() - start))

    await ours()  # starts the node
    sides: dict[str, Action] = {"hadal": ours}
    root = _peer_root(home)
    for name, find in (("crun", _oci), ("runc", _oci), ("podman", _podman), ("bwrap", _bwrap)):
        if shutil.which(name) is None:
            report.notes.append(
                f"{name}: not installed (Debian: apt-get install {_PACKAGES[name]})"
            )
        else:
            sides[name] = find(name, root, home)
    if swe_rex is not None:
        sides["swe-rex local"] = _swe_rex(swe_rex, stack)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for name, action in list(sides.items()):
        try:
            await action()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            report.notes.append(
                f"{name}: does not run here: {said.decode(errors='replace')[-200:]}"
            )
            del sides[name], taken[name]
    for _ in range(rounds):
        for name, action in sides.items():
            taken[name].append(await _timed(action))
    report.figures["create to first result: hadal"] = Spread.of(without_end[2:])
    for name, values in taken.items():
        report.figures[f"create, first result, end: {name}"] = Spread.of(values)


_PACKAGES = {"crun": "crun", "runc": "runc", "podman": "podman", "bwrap": "bubblewrap"}


async def _timed(action: Action) -> float:
    start = time.perf_counter()
    await action()
    return 1e3 * (time.perf_counter() - start)


def _peer_root(home: Path) -> Path:
    """Make a root that the peers mount /usr into, like the image `host`."""
    root = home / "peer"
    for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "run", "var"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    return root


async def _call(*command: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, stderr = await process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, str(command[0]), stderr=stderr)


def _oci(name: str, root: Path, home: Path) -> Action:
    bundle = home / f"bundle-{name}"
    bundle.mkdir()
    kinds = ("pid", "mount", "ipc", "uts", "network")
    config = {
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": str(root)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/usr", "source": "/usr", "options": ["bind", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "resources": {"memory": {"limit": 64 * _MIB}, "pids": {"limit": 64}},
        },
    }  # fmt: skip
    (bundle / "config.json").write_text(json.dumps(config))

    async def run() -> None:
        box = f"hb-{uuid.uuid4().hex[:12]}"
        await _call(*_ONE_CGROUP, name, "run", "--bundle", bundle, box)

    return run


_ONE_CGROUP = (
    "unshare", "-m", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh",
)  # fmt: skip
"""Runs a command where crun does not see both versions of cgroups; it refuses such hosts."""


def _podman(name: str, root: Path, home: Path) -> Action:
    async def run() -> None:
        limits = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
        await _call(
            *_ONE_CGROUP, name, "run", "--rm", "--network", "none", *limits, "--volume", "/usr:/usr:ro",
            "--rootfs", root, "true",
        )  # fmt: skip

    return run


def _bwrap(name: str, root: Path, home: Path) -> Action:
    async def run() -> None:
        await _call(
            name, "--unshare-all", "--bind", str(root), "/", "--ro-bind", "/usr", "/usr", "--proc",
            "/proc", "--dev", "/dev", "true",
        )  # fmt: skip

    return run


_SWE_REX = """
import asyncio, sys
from swerex.deployment.local import LocalDeployment
from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest
async def main():
    for line in sys.stdin:
        deployment = LocalDeployment()
        await deployment.start()
        await deployment.runtime.execute(Command(command=["true"]))
        await deployment.stop()
        print("done", flush=True)
asyncio.run(main())
"""


def _swe_rex(python: Path, stack: ExitStack) -> Action:
    process = stack.enter_context(
        subprocess.Popen(
            [python, "-c", _SWE_REX],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    )
    assert process.stdin is not None
    stack.callback(process.stdin.close)

    async def run() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        while (line := process.stdout.readline()) and line != "done\n":
            pass

    return run


# --- in a box that lives ---


async def _in_a_box(report: Report, rounds: int) -> None:
    async with await AsyncSandbox.create(_SMALL) as box:
        await box.run(["true"])
        names = ("execute", "write and read 4 KiB", "fork", "snapshot")
        figures: dict[str, list[float]] = {name: [] for name in names}

        async def execute() -> None:
            await box.run(["true"])

        async def write_and_read() -> None:
            await box.files.write("/tmp/f", b"x" * 4096)
            await box.files.read("/tmp/f")

        async def snapshot() -> None:
            await box.snapshot()

        for _ in range(5 * rounds):
            figures["execute"].append(await _timed(execute))
        for _ in range(rounds):
            figures["write and read 4 KiB"].append(await _timed(write_and_read))
            start = time.perf_counter()
            [child] = await box.fork()
            figures["fork"].append(1e3 * (time.perf_counter() - start))
            await child.kill()
            await box.files.write("/srv/f", os.urandom(1 << 20), parents=True)
            figures["snapshot"].append(await _timed(snapshot))
        for name, values in figures.items():
            report.figures[name] = Spread.of(values)
    async with await AsyncSandbox.create(
        FunctionSpec(memory_mb=128, disk_mb=64, inodes=1024)
    ) as box:
        source = "def f(x): return x + 1"
        await box.call(source, (1,))

        async def call() -> None:
            await box.call(source, (1,))

        report.figures["call"] = Spread.of([await _timed(call) for _ in range(5 * rounds)])


async def _coming_back(report: Report, commands: int) -> None:
    trajectory = uuid.uuid4().hex
    async with await AsyncSandbox.create(_SMALL, trajectory=trajectory) as box:
        for number in range(commands):
            await box.run(["echo", str(number)])
        again = await AsyncSandbox.create(_SMALL, trajectory=trajectory)
        start = time.perf_counter()
        for number in range(commands):
            await again.run(["echo", str(number)])
        report.figures["fast-forward, commands/s"] = commands / (time.perf_counter() - start)
        again.detach()
        await again.close()


# --- many ---


async def _many(report: Report, count: int) -> None:
    """Make so many boxes, and then count how fast more come and go beside them."""
    boxes: list[AsyncSandbox] = []
    before = await asyncio.to_thread(settled_bytes)

    async def make(number: int) -> None:
        for _ in range(number):
            made = await AsyncSandbox.create(_SMALL)
            boxes.append(made)

    try:
        start = time.perf_counter()
        await asyncio.gather(*(make(count // 4) for _ in range(4)))
        rate = len(boxes) / (time.perf_counter() - start)
        after = await asyncio.to_thread(settled_bytes)
        report.figures[f"{count:,} boxes: MiB of host memory for each"] = (
            (before - after) / len(boxes) / _MIB
        )
        report.figures[f"{count:,} boxes: creations/s up to them"] = rate
        more = min(400, count)
        start = time.perf_counter()
        await asyncio.gather(*(make(more // 4) for _ in range(4)))
        report.figures[f"{count:,} boxes: creations/s beside them"] = (more // 4 * 4) / (
            time.perf_counter() - start
        )
        times = [await _timed(lambda: _run_true(boxes[-1])) for _ in range(50)]
        report.figures[f"{count:,} boxes: execute beside them"] = Spread.of(times)
    finally:
        start = time.perf_counter()
        for at in range(0, len(boxes), 16):
            await asyncio.gather(*(box.kill() for box in boxes[at : at + 16]))
        report.figures[f"{count:,} boxes: ends/s"] = len(boxes) / (time.perf_counter() - start)


async def _run_true(box: AsyncSandbox) -> None:
    await box.run(["true"])

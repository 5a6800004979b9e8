"""Virtual machines: how fast they boot, start from a template, answer, stand still and multiply, and what they weigh."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from hadal.bench.memory_in_use import proportional_bytes
from hadal.bench.report import Report, Spread
from hadal.bench.small_root import make_small_root
from hadal.node.guest_program import guest_program
from hadal.node.images import ImageStore
from hadal.node.machines.kvm import kvm_fault
from hadal.sandbox import AsyncSandbox, MicroVMSpec, VMSpec

__all__ = ["measure"]

_MIB = 1 << 20
_IMAGE = "bench-machine:1"
_PROGRAMS = ("sh", "true", "cat", "sleep")
_STATIC = "/bin/static"
_PIDS = 1000
_SPARE_S = 2.0
_Kind = type[MicroVMSpec] | type[VMSpec]


def _spec(kind: _Kind, pids: int = _PIDS) -> MicroVMSpec | VMSpec:
    """Return the spec of a small machine; with another number of processes it has another template."""
    return kind(image=_IMAGE, memory_mb=128, disk_mb=256, inodes=10_000, pids=pids)


def measure(rounds: int, live: list[int]) -> Report:
    """Measure everything on a node of its own.

    Args:
        rounds: Of every figure with a spread; boots are a fifth of that.
        live: Numbers of machines that live when their memory is counted, growing.
    """
    with tempfile.TemporaryDirectory(prefix="hb") as home:
        before = os.environ.get("HADAL_HOME")
        os.environ["HADAL_HOME"] = home
        try:
            root = Path(home, "root")
            make_small_root(root, _PROGRAMS)
            shutil.copy(guest_program(), root / _STATIC[1:])
            store = ImageStore(Path(home, "node", "images"))
            asyncio.run(store.import_directory(root, _IMAGE))
            return asyncio.run(_measure(rounds, live, Path(home)))
        finally:
            os.environ.pop("HADAL_HOME") if before is None else os.environ.update(HADAL_HOME=before)


async def _measure(rounds: int, live: list[int], home: Path) -> Report:
    how = "with KVM" if kvm_fault() is None else "emulated"
    report = Report(f"virtual machines of 128 MiB, {how}: ms unless it says otherwise")
    await _starts(report, rounds, MicroVMSpec, "")
    _sizes(report, home)
    await _in_a_machine(report, rounds, MicroVMSpec, "")
    await _weights(report, live, home)
    await _starts(report, rounds, VMSpec, "vm: ")
    await _in_a_machine(report, rounds, VMSpec, "vm: ")
    report.notes.append(
        "boot: of a new kind of machine, until its first command has ended; with its template made and"
        " digested. Start: the same from the template, with an identity of its own. Each command has a"
        " record in the journal before and after it. Memory is that of the hypervisors, with what they share divided"
        " among them. Lines with vm are of whole machines, the others of microVMs."
    )
    return report


async def _ms(action: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await action()
    return 1e3 * (time.perf_counter() - start)


async def _starts(report: Report, rounds: int, kind: _Kind, prefix: str) -> None:
    boots: list[float] = []
    for number in range(max(1, rounds // 5)):
        start = time.perf_counter()
        async with await AsyncSandbox.create(_spec(kind, _PIDS + 1 + number)) as box:
            await box.run(["true"])
            boots.append(1e3 * (time.perf_counter() - start))
    report.figures[f"{prefix}boot to first result"] = Spread.of(boots)
    created: list[float] = []
    first: list[float] = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        async with await AsyncSandbox.create(_spec(kind)) as box:
            ready = time.perf_counter()
            await box.run(["true"])
            if number:  # the first one makes the template
                created.append(1e3 * (ready - start))
                first.append(1e3 * (time.perf_counter() - start))
    report.figures[f"{prefix}start: created"] = Spread.of(created)
    report.figures[f"{prefix}start to first result"] = Spread.of(first)
    report.figures[f"{prefix}start to first result, from a spare"] = Spread.of(
        [await _given(kind) for _ in range(rounds)]
    )


async def _given(kind: _Kind) -> float:
    """Return how long it takes where a machine is ready for whoever asks, in ms."""
    spec = _spec(kind).model_copy(update={"spare": 1})
    async with await AsyncSandbox.create(spec):
        await asyncio.sleep(_SPARE_S)  # until the next one is ready
        start = time.perf_counter()
        async with await AsyncSandbox.create(spec.model_copy(update={"spare": 0})) as box:
            await box.run(["true"])
            return 1e3 * (time.perf_counter() - start)


def _sizes(report: Report, home: Path) -> None:
    """Count what a snapshot takes on the disk."""
    template = next((home / "node/machines/templates").iterdir())
    for name in ("memory", "devices", "disks/0"):
        taken = (template / name).stat().st_blocks * 512
        report.figures[f"snapshot: MiB of {name.partition('/')[0]}"] = taken / _MIB


async def _in_a_machine(report: Report, rounds: int, kind: _Kind, prefix: str) -> None:
    async with await AsyncSandbox.create(_spec(kind)) as box:

        async def execute() -> None:
            await box.run(["true"])

        async def execute_static() -> None:
            await box.run([_STATIC, "version"])

        async def resume() -> None:
            await box.resume()
            await box.run(["true"])

        figures: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            figures.setdefault(name, []).append(value)

        for _ in range(10):
            await execute()
            await execute_static()
        for _ in range(5 * rounds):
            note("execute", await _ms(execute))
            note("execute: no libraries", await _ms(execute_static))
        for _ in range(rounds):
            note("pause", await _ms(box.pause))
            note("resume to first result", await _ms(resume))
            start = time.perf_counter()
            [child] = await box.fork()
            note("fork", 1e3 * (time.perf_counter() - start))
            await child.run(["true"])
            note("fork to first result", 1e3 * (time.perf_counter() - start))
            await child.kill()
            await box.files.write("/srv/f", os.urandom(1 << 20), parents=True)
            note("snapshot of files", await _ms(box.snapshot))
        for name, values in figures.items():
            report.figures[prefix + name] = Spread.of(values)


def _daemon(home: Path) -> int:
    """Return the process that serves the node of a folder."""
    return int(Path(home, "node", "lock").read_text(encoding="ascii"))


async def _weights(report: Report, live: list[int], home: Path) -> None:
    boxes: list[AsyncSandbox] = []
    daemon = _daemon(home)
    try:
        for count in sorted(live):
            while len(boxes) < count:
                boxes.append(await AsyncSandbox.create(_spec(MicroVMSpec)))
                await boxes[-1].run(["true"])
            await asyncio.sleep(1)
            whole = proportional_bytes(daemon, "qemu-system")
            report.figures[f"{count:,} machines: MiB of host memory for each"] = (
                whole / len(boxes) / _MIB
            )
    finally:
        await asyncio.gather(*(box.kill() for box in boxes))

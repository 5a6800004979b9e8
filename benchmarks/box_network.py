"""Networks of boxes: making, taking, changing and ending them, with 0, 200 and 2,000 others alive.

Runs in a network namespace of its own. Prints milliseconds: median and 95th percentile.
`python benchmarks/box_network.py [number ...]`
"""

import asyncio
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from hadal.node.network import NetworkConfig, NetworkManager, namespace
from hadal.sandbox.network_policy import NetworkPolicy

T = TypeVar("T")
SAMPLES = 50
SAME = NetworkPolicy(allow=("203.0.113.0/24:443", "github"))


def policy(number: int) -> NetworkPolicy:
    """Return a policy that no other box has."""
    return NetworkPolicy(allow=(f"198.51.{number >> 8}.{number & 255}:443", "github"))


def slab_kib() -> int:
    """Return the kernel's memory for its own objects."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Slab:"))


def show(what: str, alive: int, milliseconds: list[float]) -> None:
    """Print a row."""
    ordered = sorted(milliseconds)
    high = ordered[int(len(ordered) * 0.95)]
    print(f"{alive:6}  {what:34} {statistics.median(ordered):8.2f} {high:8.2f}")


async def timed(work: Awaitable[T]) -> tuple[float, T]:
    """Return how long something took, and what it is."""
    began = time.perf_counter()
    result = await work
    return (time.perf_counter() - began) * 1e3, result


async def samples(manager: NetworkManager, alive: int) -> None:
    """Take, change and end networks while others live."""
    await asyncio.sleep(0.5)  # the pool fills
    for name, policies in (
        ("take, a policy that others have", [SAME] * SAMPLES),
        ("take, a policy of its own", [policy(60000 + alive + n) for n in range(SAMPLES)]),
    ):
        took = [await timed(manager.take(p)) for p in policies]
        show(name, alive, [t for t, _ in took])
        networks = [n for _, n in took]
        if policies[0] is SAME:
            show(
                "update, policy known",
                alive,
                [(await timed(manager.update(n, NetworkPolicy.open())))[0] for n in networks],
            )
        else:
            show(
                "update, policy new",
                alive,
                [
                    (await timed(manager.update(n, policy(50000 + alive + i))))[0]
                    for i, n in enumerate(networks)
                ],
            )
        show("give back", alive, [(await timed(manager.give_back(n)))[0] for n in networks])
        await asyncio.sleep(0.5)


async def main(numbers: list[int]) -> None:
    """Measure with so many boxes alive."""
    print(f"{os.cpu_count()} processors, {platform.release()}, {time.strftime('%F %T')}")
    print(f"{'alive':>6}  {'':34} {'median':>8} {'p95':>8}  ms")
    with tempfile.TemporaryDirectory() as directory:
        config = NetworkConfig(name="bench", directory=Path(directory), pool=64)
        async with NetworkManager(config) as manager:
            networks: list[object] = []
            for number in numbers:
                fresh = number - len(networks)
                before = slab_kib()
                began = time.perf_counter()
                for n in range(fresh):
                    networks.append(await manager.take(policy(len(networks)) if n % 2 else SAME))
                if fresh:
                    each = (time.perf_counter() - began) * 1e3 / fresh
                    print(f"{number:6}  make and take, pool empty, each    {each:8.2f}")
                    kib = (slab_kib() - before) / fresh
                    print(f"{number:6}  kernel memory, KiB each            {kib:8.0f}")
                await samples(manager, number)
            began = time.perf_counter()
            for network in networks:
                await manager.give_back(network)
            print(f"give back of all: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    with namespace.new_namespace():
        asyncio.run(main([int(a) for a in sys.argv[1:]] or [0, 200, 2000]))

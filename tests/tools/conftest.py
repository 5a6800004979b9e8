"""Boxes for tools: real ones, on a node of the run's own."""

import asyncio

import pytest

from hadal.sandbox import AsyncSandbox, ContainerSpec

SPEC = ContainerSpec(memory_mb=256, disk_mb=256, inodes=4096, pids=128)


@pytest.fixture
def in_box(node):
    """Runs an async function with a box."""

    def run(function, **changes):
        async def whole():
            async with await AsyncSandbox.create(SPEC.model_copy(update=changes)) as box:
                return await function(box)

        return asyncio.run(whole())

    return run

"""Boxes for tools: real ones, on a node of the run's own."""

import asyncio
import os

import pytest

from hadal.sandbox import AsyncSandbox, ContainerSpec

SPEC = ContainerSpec(memory_mb=256, disk_mb=256, inodes=4096, pids=128)


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A node that the first box starts; ends by itself when the tests are over."""
    if os.geteuid() != 0:
        pytest.skip("boxes are made by root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(tmp_path_factory.mktemp("hadal")))
        yield


@pytest.fixture
def in_box(node):
    """Runs an async function with a box."""

    def run(function, **changes):
        async def whole():
            async with await AsyncSandbox.create(SPEC.model_copy(update=changes)) as box:
                return await function(box)

        return asyncio.run(whole())

    return run

"""What every test relies on: few threads, fixed seeds, no gradients left behind."""

import os

import pytest
import torch

from hadal.node.machines.kernel import kernel_folder
from hadal.sandbox.embedded import state_folder

KERNEL = kernel_folder(state_folder())
"""Where set-up has put it: fixtures change HADAL_HOME."""


def pytest_configure(config: pytest.Config) -> None:
    # Workers of a parallel run share the cores: more threads than cores spin against each other.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernel():
    """Let machines boot the kernel that set-up has fetched, unless another one is named."""
    with pytest.MonkeyPatch.context() as patch:
        if "HADAL_KERNEL" not in os.environ and KERNEL.exists():
            patch.setenv("HADAL_KERNEL", str(KERNEL))
        yield


@pytest.fixture(scope="session")
def node(tmp_path_factory, kernel):
    """A node of these tests, started by the first box; ends by itself when they are over."""
    if os.geteuid() != 0:
        pytest.skip("boxes are made by root")
    home = tmp_path_factory.mktemp("hadal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(home))
        yield home
    log = home / "node" / "node.log"
    said = log.read_text() if log.exists() else ""
    assert "Traceback" not in said, said[-5000:]

"""What every test relies on: few threads, fixed seeds, no gradients left behind."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Workers of a parallel run share the cores: more threads than cores spin against each other.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

"""A node of the run's own."""

import os

import pytest


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A node that the first box starts; ends by itself when the tests are over."""
    if os.geteuid() != 0:
        pytest.skip("boxes are made by root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(tmp_path_factory.mktemp("hadal")))
        yield

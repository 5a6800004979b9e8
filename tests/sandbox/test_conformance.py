"""The conformance suite against every backend of this machine, through an embedded node."""

from pathlib import Path

import pytest

from hadal.sandbox import ContainerSpec, FunctionSpec, Sandbox
from hadal.sandbox.testing import all_checks
from tests.sandbox.conftest import needs_root

pytestmark = needs_root
BACKENDS = {"container": ContainerSpec, "function": FunctionSpec}


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A node of these tests, started by the first box; ends by itself when they are over."""
    home = tmp_path_factory.mktemp("hadal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(home))
        yield home
    log = Path(home, "node/node.log")
    assert "Traceback" not in log.read_text(), log.read_text()[-5000:]


def cases():
    for backend, spec in BACKENDS.items():
        for check in all_checks():
            if check.needs <= spec.capabilities:
                marks = [pytest.mark.slow] if check.slow else []
                yield pytest.param(backend, check, id=f"{backend}-{check.name}", marks=marks)


@pytest.mark.parametrize(("backend", "check"), list(cases()))
def test_backend(node, backend, check):
    def make(*, trajectory=None, **changes):
        return Sandbox.create(BACKENDS[backend](**changes), trajectory=trajectory)

    check.run(make)

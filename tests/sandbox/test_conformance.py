"""The conformance suite against every backend of this machine, through an embedded node."""

import pytest

from hadal.sandbox import ContainerSpec, FunctionSpec, Sandbox
from hadal.sandbox.testing import all_checks
from tests.sandbox.conftest import needs_root

pytestmark = needs_root
BACKENDS = {"container": ContainerSpec, "function": FunctionSpec}


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

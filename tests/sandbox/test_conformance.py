"""The conformance suite against every backend of this machine, through an embedded node."""

import pytest

from hadal.sandbox import ContainerSpec, FunctionSpec, MicroVMSpec, Sandbox, VMSpec
from hadal.sandbox.specs import Capability
from hadal.sandbox.testing import all_checks
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines
from tests.sandbox.network_lab import needs_network

pytestmark = needs_root
BACKENDS = {
    "container": ContainerSpec,
    "function": FunctionSpec,
    "microvm": MicroVMSpec,
    "vm": VMSpec,
}
MACHINES = {"microvm", "vm"}


def cases():
    for backend, spec in BACKENDS.items():
        for check in all_checks():
            if check.needs <= spec.capabilities:
                marks = [pytest.mark.slow] if check.slow else []
                marks += [pytest.mark.long] if check.slow and backend in MACHINES else []
                marks += [needs_network] if Capability.NETWORK in check.needs else []
                yield pytest.param(backend, check, id=f"{backend}-{check.name}", marks=marks)


@pytest.fixture(scope="module")
def machine_image(node, tmp_path_factory):
    """The image of machines: `host` is for containers."""
    needs_machines()
    return import_image(node / "node" / "images", tmp_path_factory.mktemp("image"))


@pytest.mark.parametrize(("backend", "check"), list(cases()))
def test_backend(node, request, backend, check):
    common = {}
    if backend in MACHINES:
        common["image"] = request.getfixturevalue("machine_image")

    def make(*, trajectory=None, **changes):
        return Sandbox.create(BACKENDS[backend](**common | changes), trajectory=trajectory)

    check.run(make)

"""The HTTP surface, fuzzed by its own description: no server error, no undeclared answer."""

import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from hadal.serve import build_app
from hadal.serve.openapi import document
from tests.serve.fixtures import engine_front, scripted, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
schema = schemathesis.openapi.from_dict(document())


pytestmark = pytest.mark.slow  # a request may ask for 128 choices


@pytest.fixture(scope="module")
def served():
    """An engine and the address of its server."""
    front = engine_front(max_model_len=16, max_num_seqs=32)
    engine = front.backend.engine
    with serving(front, max_body_bytes=200_000) as url:
        yield engine, url


@schema.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case, served):
    _, url = served
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)


def test_nothing_is_left_of_it(served):
    """Runs after the fuzzing, on the same server."""
    engine, url = served
    ask = {"prompt": "a", "max_tokens": 1}
    assert httpx.post(f"{url}/v1/completions", json=ask, timeout=60).status_code == 200
    deadline = time.monotonic() + 10  # clients that were gone early
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engine.has_work
    assert engine.cache.pool.use().held == 0


def test_every_route_is_described():
    app = build_app(scripted())
    routes = {route.path: route.methods - {"HEAD"} for route in app.routes}
    described = {
        path: {method.upper() for method in item} for path, item in document()["paths"].items()
    }
    assert described == routes

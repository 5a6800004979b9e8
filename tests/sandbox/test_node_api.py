"""The node over HTTP: `hadal node serve`, its keys, its TLS, and its description of itself."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
import urllib.request

import pytest
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hadal.node.app import build_node_app
from hadal.node.openapi import document
from tests.sandbox.command_line import CommandLine
from tests.sandbox.conftest import needs_root

KEY = "a-key-of-32-characters-for-tests"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(document())


@contextlib.contextmanager
def serving(hadal, state, *options):
    """Run `hadal node serve` and yield the process and the port."""
    process = hadal.start(
        "node", "serve", "--state", state, "--port", "0", "--name", f"test-{state.name}", *options,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if "listening on" in line:
                break
        else:
            raise AssertionError("".join(said))
        yield process, int(line.rsplit(":", 1)[1]), said
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


@pytest.fixture
def hadal(tmp_path):
    return CommandLine(tmp_path / "home")


def test_every_route_is_described():
    app = build_node_app(object())
    routes = {}
    for resource in app.router.resources():
        path = resource.canonical
        routes[path] = {r.method for r in resource if r.method != "HEAD"} | routes.get(path, set())
    described = {
        path: {method.upper() for method in item} for path, item in document()["paths"].items()
    }
    assert described == routes
    assert isinstance(app, web.Application)


def test_every_reference_leads_somewhere():
    schemas = document()["components"]["schemas"]
    for part in json.dumps(document()).split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in schemas


@pytest.mark.slow
@needs_root
def test_keys_and_life(hadal, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\n{KEY}\n")
    state = tmp_path / "state"
    with serving(hadal, state, "--key-file", keys, "--max-boxes", "1") as (process, port, said):
        assert "warning" not in "".join(said)
        url = f"http://127.0.0.1:{port}"
        assert "does not know this API key" in hadal.refused("box", "ls", "--node", url)
        assert "API key" in hadal.refused("box", "ls", "--node", url, "--key", KEY + "x")
        there = {"HADAL_NODE": url, "HADAL_NODE_KEY": KEY}
        box = hadal.text("box", "create", "--idle", "1h", **there).strip()
        assert "as many as it may" in hadal.refused("box", "create", **there)
        data = bytes(range(256)) * 1000
        assert hadal("box", "run", box, "--", "cat", stdin=data, **there).stdout == data
        status = json.loads(hadal.text("node", "status", "--json", **there))
        assert (status["boxes"], status["max_boxes"], status["pid"]) == (1, 1, process.pid)
        assert "on its machine" in hadal.refused("node", "stop", **there)
        assert "another node daemon" in hadal.refused("node", "serve", "--state", state)
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            assert answer.read() == b"ok"
    assert process.returncode == 0
    with serving(hadal, state, "--key-file", keys) as (process, _, _):  # boxes live on
        socket = f"unix://{state}/node.sock"
        assert box in hadal.text("box", "ls", "--node", socket)
        hadal("node", "stop", "--end-boxes", "--node", socket)
        assert process.wait(timeout=20) == 0
    assert "not running" in hadal.text("node", "status", "--node", socket, code=1)
    assert (state / "node.log").stat().st_size > 0


@pytest.mark.slow
@needs_root
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_tls(hadal, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    files = ("--tls-cert", certificate, "--tls-key", key)
    hadal.environment["HADAL_NODE_KEYS"] = KEY
    with serving(hadal, tmp_path / "state", *files) as (_, port, _):
        hadal.environment["HADAL_NODE_KEY"] = KEY
        url = f"https://127.0.0.1:{port}"
        assert hadal.text("box", "ls", "--node", url, "--ca", certificate) == "no boxes\n"
        assert hadal.text("box", "ls", HADAL_NODE=url, HADAL_NODE_CA=str(certificate))
        assert "cannot be reached" in hadal.refused("box", "ls", "--node", url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0", "--port", "0"], "a port needs an API key"),
        (["--port", "0"], "a port needs an API key"),
        (["--port", "0", "--key-file", "/no/such"], "--key-file /no/such"),
        (["--port", "0", "--key-file", "/dev/null"], "it has no key"),
        (["--port", "0", "--tls-cert", "/etc/passwd"], "both --tls-cert and --tls-key"),
        (["--port", "0", "--tls-cert", "/no", "--tls-key", "/no"], "/no: no such file"),
    ],
)
def test_wrong_settings(hadal, options, message):
    assert message in hadal.refused("node", "serve", *options, code=2)


@pytest.mark.parametrize(
    "url", ["/run/node.sock", "unix://node.sock", "localhost:1", "http://", "ftp://x"]
)
def test_wrong_addresses(hadal, url):
    said = hadal.refused("box", "ls", "--node", url, code=2)
    assert "expected unix:///path or http(s)://host:port" in said
    assert ("hint: write unix:///run/node.sock" in said) == url.startswith("/")


def test_short_keys_are_refused(hadal):
    said = hadal.refused("node", "serve", code=2, HADAL_NODE_KEYS="secret")
    assert "at least 16 characters" in said
    assert "secret" not in said.replace("import secrets", "").replace("secrets.token", "")


@pytest.mark.slow
@needs_root
def test_warning_without_tls(hadal, tmp_path):
    hadal.environment["HADAL_NODE_KEYS"] = KEY
    with serving(hadal, tmp_path / "state", "--host", "0.0.0.0") as (_, _, said):
        assert "without TLS" in "".join(said)


def test_no_node_there(hadal):
    began = time.monotonic()
    assert "cannot be reached" in hadal.refused("box", "ls", "--node", "http://127.0.0.1:9")
    assert time.monotonic() - began < 15


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    hadal = CommandLine(folder / "home")
    hadal.environment["HADAL_NODE_KEYS"] = KEY
    with serving(hadal, folder / "state", "--max-boxes", "200") as (_, port, _):
        yield f"http://127.0.0.1:{port}"
        socket = f"unix://{folder}/state/node.sock"
        hadal("box", "rm", "--all", "--node", socket)


@pytest.mark.slow
@needs_root
@schema.parametrize()
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case, address):
    headers = {"Authorization": f"Bearer {KEY}"}
    case.call_and_validate(base_url=address, checks=CHECKS, headers=headers, timeout=60)

"""A client that sends anything: the node answers with an error of ours, and 500 is never the answer."""

import http.client
import json
import socket

import pytest

from tests.sandbox.conftest import needs_root

pytestmark = needs_root
DEEP = "[" * 100_000 + "]" * 100_000
BODIES = [
    b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", DEEP.encode(), b'{"spec":' + DEEP.encode() + b"}",
    b"9" * 100_000, b'{"request_id": 1e999}', b'{"request_id": NaN}', b'{"request_id": "\\ud800"}',
    b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}",
]  # fmt: skip
R = {"request_id": "r"}
FIELDS = {
    "/v1/boxes": [
        {"spec": {"backend": "container", **spec}, **R}
        for spec in (
            {"memory_mb": 2**80}, {"memory_mb": -1}, {"memory_mb": "x"}, {"shm_mb": 2**60}, {"disk_mb": 2**60},
            {"cpus": 1e400}, {"cpus": "NaN"}, {"pids": 0}, {"nofile": 2**40}, {"inodes": 2**60},
            {"image": ""}, {"image": "\0"}, {"image": "\ud800"}, {"image": "no such"}, {"image": "/etc/passwd"},
            {"mounts": [{"source": "x", "target": "/x"}]}, {"mounts": [{"source": "/etc\0", "target": "/x"}]},
            {"mounts": [{"source": "/etc", "target": "/x\0rw"}]}, {"env": {"A": 1}}, {"env": []}, {"unknown": 1},
            {"ttl_s": -1}, {"ttl_s": 1e308}, {"labels": {"a": {}}}, {"backend": "rocket"}, {"user": 5},
        )
    ] + [{"spec": {}}, {"spec": [], **R}, {"spec": {}, "request_id": "x" * 201}],
    "/v1/boxes/{box}/commands": [
        R, {"argv": [], **R}, {"argv": ["a\0b"], **R}, {"argv": ["\ud800"], **R}, {"argv": "ls", **R},
        {"argv": [1], **R}, {"shell": ["x"], **R}, {"shell": "x", "argv": ["x"], **R}, {"shell": "x", "tty": [1], **R},
        {"shell": "x", "tty": [-1, 2**70], **R}, {"shell": "x", "timeout_s": 0, **R}, {"shell": "x", "stdin": "%", **R},
        {"shell": "x", "env": {"A\0": "b"}, **R}, {"shell": "x", "env": {"\ud800": "b"}, **R},
        {"shell": "x", "user": "\ud800", **R}, {"shell": "x", "user": "a\0", **R}, {"shell": "x", "cwd": "\0", **R},
        {"shell": "x", "output_limit": -1, **R}, {"shell": "x", "output_limit": 2**70, **R},
        {"argv": ["x" * 300_000], "request_id": "large"},
    ],
    "/v1/boxes/{box}/files": [
        {"operation": "eat", "path": "/x", **R}, {"operation": "remove", **R}, {"operation": "remove", "path": 1, **R},
        {"operation": "remove", "path": "\ud800", **R}, {"operation": "chmod", "path": "/x", "target": "\0", **R},
    ],
    "/v1/boxes/{box}/commands/1/signal": [{}, {"signal": 0}, {"signal": 65}, {"signal": "KILL"}],
    "/v1/boxes/{box}/call": [{"source": "x", "name": "y", "arguments": [], **R}, {}, {"timeout_s": -1, **R}],
    "/v1/boxes/{box}/fork": [{"count": 0, **R}, {"count": 10**9, **R}, {}],
}  # fmt: skip
QUERIES = [
    ("GET", "/v1/boxes/{box}/files"), ("GET", "/v1/boxes/{box}/files?path=%00"),
    ("GET", "/v1/boxes/{box}/files?path=/x&what=eat"), ("GET", "/v1/boxes/{box}/files?path=/x&offset=-1"),
    ("GET", "/v1/boxes/{box}/files?path=/etc/hosts&offset=%C2%B2"), ("GET", "/v1/boxes/{box}/files?path=%ff&what=stat"),
    ("GET", "/v1/boxes/{box}/files?path=/x&length=" + "9" * 5000), ("GET", "/v1/boxes/{box}/files?path=" + "x" * 5000),
    ("GET", "/v1/boxes/{box}/files?path=/etc/hosts&user=%00"), ("GET", "/v1/boxes/{box}/files?path=/etc/hosts&user=%ff"),
    ("PUT", "/v1/boxes/{box}/files?path=/tmp/x&request_id=q1&mode=abc"), ("PUT", "/v1/boxes/{box}/files?path=/tmp/x"),
    ("PUT", "/v1/boxes/{box}/files?path=/tmp/x&request_id=q2&mode=-1"), ("PUT", "/v1/boxes/{box}/files?path=/tmp/x&request_id=q3&how=eat"),
    ("PUT", "/v1/boxes/{box}/files?path=/tmp&request_id=q4&how=unpack&user=%00"),
    ("GET", "/v1/boxes/{box}/log?after=x"), ("GET", "/v1/boxes/{box}/log?after=" + "9" * 30),
    ("GET", "/v1/boxes/none"), ("GET", "/v1/boxes/%ff"), ("GET", "/v1/boxes/..%2f..%2f"), ("GET", "/v1/nothing"),
    ("DELETE", "/v1/boxes"), ("POST", "/v1/boxes/none/pause"), ("GET", "/v1/blobs/" + "0" * 64), ("GET", "/v1/blobs/x"),
    ("GET", "/v1/boxes/{box}/commands/" + "9" * 4400 + "/attach"), ("GET", "/v1/boxes/{box}/commands/99/attach"),
    ("GET", "/v1/boxes/{box}/ports/99999"), ("GET", "/v1/boxes/{box}/ports/x"),
]  # fmt: skip


class Connection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path):
        super().__init__("node", timeout=30)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


@pytest.fixture(scope="module")
def ask(node):
    """Return what sends a request and checks that its refusal is one of ours."""
    from hadal.sandbox import ContainerSpec, Sandbox
    from tests.security.conftest import TIGHT

    with Sandbox.create(ContainerSpec(**TIGHT)) as box:

        def ask(method, path, body=b"", headers=None):
            connection = Connection(node / "node.sock")
            try:
                connection.request(method, path.format(box=box.id), body, headers or {})
                answer = connection.getresponse()
                text = answer.read()
            finally:
                connection.close()
            # 501: what this kind of box cannot do, asked for properly or not.
            assert 400 <= answer.status < 500 or answer.status == 501, (answer.status, text[:500])
            error = json.loads(text)
            assert set(error) == {"code", "message", "hint", "details"}, error
            assert len(text) < 20_000
            return answer.status, error

        yield ask
        assert box.run("echo on").stdout == "on\n"


@pytest.mark.parametrize("path", FIELDS)
def test_bodies_that_are_none(ask, path):
    for body in BODIES:
        ask("POST", path, body)


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in FIELDS.items() for body in bodies],
    ids=lambda value: str(value)[:60].replace("\0", "0"),
)  # fmt: skip
def test_fields_that_are_wrong(ask, path, body):
    ask("POST", path, json.dumps(body).encode())


@pytest.mark.parametrize(("method", "path"), QUERIES, ids=lambda value: value[:60])
def test_queries_that_are_wrong(ask, method, path):
    ask(method, path)


def test_a_body_without_an_end_is_cut_off(ask, node):
    status, _ = ask("POST", "/v1/boxes", b'"' + b"x" * (65 << 20))
    assert status == 413

"""The same application under another server of ASGI applications: granian."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("granian", reason="granian is not installed: make setup")

ROOT = Path(__file__).parents[2]
ASK = {"messages": [{"role": "user", "content": "Go."}]}


@contextlib.contextmanager
def granian():
    """Serve `granian_app` on a free port of the loopback; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "granian", "--interface", "asgi", "--factory"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen(
        [*command, "tests.serve.granian_app:application"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        assert until(lambda: process.poll() is not None or answers(url)), "it did not start"
        assert process.poll() is None, process.communicate()[0]
        yield url
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=30)
    assert "Traceback" not in said, said
    assert process.returncode == 0, said


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def until(holds) -> bool:
    """Ask again and again, for at most a minute."""
    deadline = time.monotonic() + 60
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])


def test_whole_streamed_and_abandoned():
    with granian() as url, httpx.Client(base_url=url, timeout=60) as client:
        chat = "/v1/chat/completions"
        whole = client.post(chat, json=ASK).json()["choices"][0]
        assert whole["message"]["content"] == "Done."
        assert whole["message"]["reasoning_content"] == "Easy."

        with client.stream("POST", chat, json=ASK | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Done."

        with client.stream("POST", chat, json=ASK | {"stream": True}) as stream:
            next(stream.iter_lines())  # and away, in the middle of it
        assert until(lambda: metric(url, "hadal:requests_abandoned_total") == 1)

        with pytest.raises(httpx.ReadTimeout):
            client.post(chat, json=ASK, timeout=1)
        assert until(lambda: metric(url, "hadal:requests_abandoned_total") == 2)
        assert metric(url, "vllm:num_requests_running") == 0
        assert metric(url, "vllm:generation_tokens_total") < 20_000

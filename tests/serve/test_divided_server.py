"""`hadal serve --tensor-parallel`: the same answers, and what happens when a process of it dies."""

import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.serve.fixtures import free_port, save_with_tokenizer, started

ASK = {
    "messages": [{"role": "user", "content": "List the files. " * 90}],
    "max_tokens": 12,
    "seed": 1,
    "logprobs": True,
}


def workers_of(process):
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def start():
    """Start a server; none outlives the test."""
    processes = []

    def start(arguments, port):
        processes.append(started(arguments, port))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_answers_deaths_and_ends(tmp_path, start):
    save_with_tokenizer(tmp_path / "model")
    common = [str(tmp_path / "model"), "--generation", "v4", "--max-model-len", "4096"]
    choices = []
    for size in (1, 2):
        port = free_port()
        process = start([*common, "--tensor-parallel", str(size)], port)
        url = f"http://127.0.0.1:{port}"
        reply = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=120).json()
        choices.append(reply["choices"][0])
        workers = workers_of(process)
        assert len(workers) == size - 1
        if size == 2:
            os.kill(workers[0], signal.SIGKILL)
            lost = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=120)
            assert lost.status_code == 500
            assert httpx.get(f"{url}/health").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        assert not any(map(alive, workers))
    assert choices[0] == choices[1]


@pytest.mark.slow
def test_kill_9_of_the_first_ends_the_others(tmp_path, start):
    save_with_tokenizer(tmp_path / "model")
    process = start(
        [str(tmp_path / "model"), "--generation", "v4", "--tensor-parallel", "2"],
        port := free_port(),
    )
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    [worker] = workers_of(process)
    process.kill()
    process.wait()
    subprocess.run(["timeout", "30", "tail", "--pid", str(worker), "-f", "/dev/null"], check=False)
    assert not alive(worker)

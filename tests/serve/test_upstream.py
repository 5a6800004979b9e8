"""Our front over another server: the same answers as directly (issue: `--upstream`)."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from hadal.backends.upstream_backend import UpstreamBackend
from hadal.serve import Front
from tests.serve.fixtures import (
    TOOLS,
    call,
    encoding,
    engine_front,
    free_port,
    save_with_tokenizer,
    scripted,
    serving,
    started,
)

QUESTION = {"messages": [{"role": "user", "content": "List the files."}]}


def over(url, send="ids", **settings) -> Front:
    backend = UpstreamBackend(url, encoding().tokenizer, send=send, **settings)
    return Front("hadal", encoding(), backend, allow_small_window=True)


@pytest.mark.parametrize("send", ["ids", "text"])
def test_the_same_tokens_as_directly(send):
    ask = QUESTION | {"max_tokens": 30, "temperature": 0.0}
    with serving(engine_front()) as direct, serving(over(direct, send)) as url:
        replies = [
            httpx.post(f"{u}/v1/chat/completions", json=ask, timeout=60).json()
            for u in (direct, url)
        ]
    first, second = (r["choices"][0]["message"] for r in replies)
    assert first == second
    assert replies[0]["usage"]["prompt_tokens"] == replies[1]["usage"]["prompt_tokens"]
    if send == "ids":
        assert replies[0]["usage"]["completion_tokens"] == replies[1]["usage"]["completion_tokens"]


@pytest.mark.parametrize("send", ["ids", "text"])
def test_calls_and_reasoning_come_through(send):
    with serving(scripted(call("ls"))) as direct, serving(over(direct, send)) as url:
        reply = httpx.post(
            f"{url}/v1/chat/completions", json=QUESTION | {"tools": TOOLS}, timeout=60
        )
    [choice] = reply.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "Look."
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {
        "command": "ls"
    }


def test_its_faults_are_told():
    with serving(over("http://127.0.0.1:9")) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60)
        assert reply.status_code == 502
        assert "127.0.0.1:9" in reply.json()["error"]["message"]
    with serving(scripted(), api_keys=("secret-key",)) as direct:
        with serving(over(direct, api_key="wrong-key")) as url:
            reply = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60)
            assert reply.status_code == 502
            assert "401" in reply.text
            assert "wrong-key" not in reply.text
        with serving(over(direct, api_key="secret-key")) as url:
            reply = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60)
            assert "no completion left" in reply.text


@pytest.mark.slow
def test_the_command_serves_drains_and_keeps_its_cache(tmp_path):
    """SIGTERM ends it after the running answer; the next one starts from what is on disk."""
    save_with_tokenizer(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--generation", "v4", "--disk", str(tmp_path / "disk")]
    ask = {"messages": [{"role": "user", "content": "List the files. " * 90}], "max_tokens": 3}
    hits = []
    for _ in range(2):
        port = free_port()
        process = started(arguments, port, {"HADAL_API_KEYS": "k"})
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        headers = {"authorization": "Bearer k"}
        reply = httpx.post(url, json=ask, headers=headers, timeout=60).json()
        hits.append(reply["hadal"]["prefix"])
        long = ask | {"max_tokens": 60, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url, json=long, headers=headers, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [*lines][-2] == "data: [DONE]"
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        process.stderr.close()
    assert hits[0]["hit"] == 0
    assert hits[1]["hit"] == hits[1]["from_disk"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0", "x"], "there is no API key"),
        ([], "expected a checkpoint or --upstream"),
        (["--upstream", "http://127.0.0.1:9"], "--upstream needs --tokenizer"),
        (["/nowhere", "--generation", "v4"], "cannot read the tokenizer"),
        (["/nowhere", "--cache", "big"], "expected a size"),
    ],
)
def test_wrong_settings(arguments, says):
    hadal = str(Path(sys.executable).parent / "hadal")
    result = subprocess.run([hadal, "serve", *arguments], capture_output=True, text=True)
    assert result.returncode in (2, 3)
    assert says in " ".join((result.stderr + result.stdout).split())
    assert "Traceback" not in result.stderr

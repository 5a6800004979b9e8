"""Servers for tests: scripted ones, and one on a small network with the whole vocabulary."""

import asyncio
import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from hadal.backends.constraint import GrammarCompiler
from hadal.checkpoint import save
from hadal.encoding import Encoding
from hadal.engine import Engine, EngineConfig
from hadal.model import Transformer, randomize
from hadal.serve import EngineBackend, Front, ScriptedBackend, ServerConfig, build_app
from tests.configs import schedule
from tests.golden.data import tokenizer_file

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "description": "Run a command.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}},
                "required": ["command"],
            },
        },
    }
]


@functools.cache
def encoding() -> Encoding:
    return Encoding.load("v4", tokenizer=tokenizer_file())


@functools.cache
def model() -> Transformer:
    config = schedule(0, 4, 128, 4, num_hash_layers=1, vocab_size=129_280)
    network = Transformer(dataclasses.replace(config, max_position_embeddings=4096))
    randomize(network, 0)
    return network


def call(
    command: str, *, thought: str = "Look.", said: str = "", tool: str = "run", **more: str
) -> list[str]:
    """A completion that thinks, speaks and calls a tool, as the model writes it."""
    from hadal.encoding.tokens import DSML, EOS, THINK_END

    d = DSML
    arguments: list[str] = []
    for name, value in ({"command": command} | more).items():
        arguments += ["<", d, f'parameter name="{name}" string="true">{value}</', d, "parameter>\n"]
    return [
        thought, THINK_END, said, "\n\n<", d, "tool_calls>\n<", d, f'invoke name="{tool}">\n',
        *arguments, "</", d, "invoke>\n</", d, "tool_calls>", EOS,
    ]  # fmt: skip


def answer(text: str, *, thought: str = "Easy.") -> list[str]:
    from hadal.encoding.tokens import EOS, THINK_END

    return [thought, THINK_END, text, EOS]


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(encoding().tokenizer, 129_280, 1)


def scripted(*completions, **settings) -> Front:
    return Front(
        "hadal", encoding(), ScriptedBackend(encoding().tokenizer, completions, **settings)
    )


def engine_front(**settings) -> Front:
    config = EngineConfig(**({"max_model_len": 4096, "cache_bytes": 64 << 20} | settings))
    tokenizer = encoding().tokenizer
    engine = Engine(model(), config, token_bytes=lambda i: tokenizer.decode_bytes([i]))
    backend = EngineBackend(engine, tokenizer.decode_bytes, compile_grammar=compiler())
    return Front("hadal", encoding(), backend, allow_small_window=True)


@contextlib.contextmanager
def serving(front: Front, **settings):
    """Run a server on a free port of the loopback; gives its URL."""
    app = build_app(front, ServerConfig(**settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                pytest.fail("the server did not start")
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def save_with_tokenizer(path: Path) -> None:
    save(model(), path)
    (path / "tokenizer.json").write_bytes(Path(tokenizer_file()).read_bytes())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(arguments, port, env=None):
    """Start `hadal serve`, and wait until it answers or ends."""
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "hadal"), "serve", *arguments, "--port", str(port)],
        env=os.environ | (env or {}),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    return process

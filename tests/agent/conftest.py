"""An encoding with a small tokenizer, and scripts of what a model says."""

import asyncio
import json

import pytest

from hadal.agent import Agent, AgentConfig, Journal, Limits
from hadal.backends.scripted_backend import ScriptedBackend
from hadal.encoding import Encoding
from hadal.encoding.tokens import DSML, EOS, THINK_END
from hadal.tools import Toolbox, tool
from hadal.train.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def encoding(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["I add the numbers. That is done. tool_calls>\n</"] * 3, 320, path)
    return Encoding.load("v4", tokenizer=path)


def calls(*arguments, name="add", thought="I add."):
    """A reply with calls."""
    items = [thought, THINK_END, "\n\n<", DSML, "tool_calls>\n"]
    for each in arguments:
        items += ["<", DSML, f'invoke name="{name}">\n']
        for key, value in each.items():
            kind = "true" if isinstance(value, str) else "false"
            text = value if isinstance(value, str) else json.dumps(value)
            items += [
                "<",
                DSML,
                f'parameter name="{key}" string="{kind}">{text}</',
                DSML,
                "parameter>\n",
            ]
        items += ["</", DSML, "invoke>\n"]
    return [*items, "</", DSML, "tool_calls>", EOS]


def answer(text, thought="That is done."):
    """A reply without calls."""
    return [thought, THINK_END, text, EOS]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Run:
    """Runs scripts against one journal."""

    def __init__(self, encoding, path):
        self.encoding = encoding
        self.path = path
        self.events = []
        self.backend = None

    def __call__(
        self,
        completions,
        messages=("Add.",),
        *,
        tools=(add,),
        limits=None,
        watch=lambda e: None,
        wrap=lambda backend: backend,
        **settings,
    ):
        self.backend = ScriptedBackend(
            self.encoding.tokenizer,
            completions,
            max_model_len=settings.pop("max_model_len", 1 << 20),
        )
        config = AgentConfig(limits=limits or Limits(), **settings)
        self.events = []

        def seen(event):
            self.events.append(event)
            watch(event)

        async def whole():
            with Journal(self.path) as journal:
                agent = Agent(
                    wrap(self.backend), self.encoding, Toolbox(tools), journal, config, watch=seen
                )
                return await agent.run(messages), agent.trajectory

        return asyncio.run(whole())


@pytest.fixture
def run(encoding, tmp_path):
    return Run(encoding, tmp_path / "run.jsonl")

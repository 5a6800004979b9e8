"""Tools made of functions."""

import asyncio
import json

import pytest

from hadal.chat import ToolCall
from hadal.errors import ConfigError
from hadal.tools import Toolbox, tool


@tool
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


@tool
async def fail(text: str) -> str:
    """Fail."""
    raise KeyError(text)


def ask(name, **arguments):
    call = ToolCall(name, json.dumps(arguments))
    return asyncio.run(Toolbox([add, fail]).call(call, "1"))


def test_declaration():
    assert add.declaration.function == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
            "required": ["a"],
        },
    }


def test_calls():
    assert ask("add", a=2).text == "3"
    assert ask("add", a=2, b=5).text == "7"
    assert ask("fail", text="x").text == "Error: KeyError: 'x'"
    assert "\n- a: expected integer" in ask("add", a="two").text
    assert ask("add").failed


def test_what_is_no_tool():
    def silent(a: int): ...

    def bare(a):
        """About."""

    for function, said in ((silent, "no docstring"), (bare, "parameter a has no annotation")):
        with pytest.raises(ConfigError, match=said):
            tool(function)
    with pytest.raises(ConfigError, match="same name"):
        Toolbox([add, add])

"""Tools of an MCP server: a real one, started as a program."""

import asyncio
import json
import sys

import pytest

from hadal.chat import ToolCall
from hadal.errors import ConfigError
from hadal.tools import Toolbox
from hadal.tools.mcp_tools import mcp_tools

SERVER = """
from mcp.server import MCPServer
server = MCPServer("numbers")
@server.tool()
def add(a: int, b: int) -> str:
    "Add two numbers."
    return str(a + b)
@server.tool()
def fail() -> str:
    "Fail."
    raise ValueError("on purpose")
server.run("stdio")
"""


def test_a_server(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(SERVER)

    async def whole():
        async with mcp_tools([sys.executable, str(path)], prefix="n_") as tools:
            toolbox = Toolbox(tools)
            names = [t.name for t in toolbox.declarations]
            outputs = [
                await toolbox.call(ToolCall(name, json.dumps(arguments)), "1")
                for name, arguments in (
                    ("n_add", {"a": 2, "b": 3}),
                    ("n_add", {"a": "x"}),
                    ("n_fail", {}),
                )
            ]
            return names, outputs

    names, (good, wrong, failed) = asyncio.run(whole())
    assert names == ["n_add", "n_fail"]
    assert good.text == "5"
    assert wrong.text.startswith("Error: The call of ")
    assert failed.failed


def test_no_server():
    async def whole():
        async with mcp_tools(["/nothing/there"]):
            pass

    with pytest.raises(ConfigError, match="cannot be used"):
        asyncio.run(whole())

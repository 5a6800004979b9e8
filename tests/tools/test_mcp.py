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
def long() -> str:
    "Say much."
    return "x" * 100_000
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
                    ("n_long", {}),
                )
            ]
            return names, outputs

    names, (good, wrong, failed, long) = asyncio.run(whole())
    assert names == ["n_add", "n_long", "n_fail"]
    assert good.text == "5"
    assert wrong.text.startswith("Error: The call of ")
    assert failed.failed
    assert len(long.text) < 17_000
    assert "bytes left out here; all 100,000 are not kept]" in long.text


ANSWERS = """
import json, sys
answers = json.loads(sys.argv[1])
for line in sys.stdin:
    asked = json.loads(line)
    if asked["method"] == "initialize":
        said = {"result": {"protocolVersion": asked["params"]["protocolVersion"],
                           "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}}}
    else:
        said = answers.get(asked["method"], {"error": {"code": -32601, "message": "Method not found"}})
    if "id" in asked and said:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **said}), flush=True)
"""
"""A server by hand, which may say what none of the library's would."""


def server_of(**answers):
    return [sys.executable, "-c", ANSWERS, json.dumps({k.replace("_", "/"): v for k, v in answers.items()})]  # fmt: skip


def tools_of(*declared):
    return {"result": {"tools": [{"inputSchema": {"type": "object"}} | d for d in declared]}}


OUTSIDE = {"type": "object", "properties": {"a": {"$ref": "http://x.example/"}}}


async def use(server):
    async with asyncio.timeout(60), mcp_tools(server) as tools:
        return await Toolbox(tools).call(ToolCall("t", "{}"), "1")


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (["/nothing/there"], "cannot be used: FileNotFoundError"),
        ([sys.executable, "-c", "1"], "cannot be used: MCPError: Connection closed"),
        ("http://127.0.0.1:9/mcp", "cannot be used: ConnectError"),
        (server_of(), "cannot be used: MCPError: Method not found"),
        (server_of(tools_list=tools_of({"name": 5})), "cannot be used: ValidationError"),
        (
            server_of(tools_list=tools_of({"name": "t", "inputSchema": OUTSIDE})),
            "refers to 'http://x.example/'",
        ),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_used(server, said):
    with pytest.raises(ConfigError) as refused:
        asyncio.run(use(server))
    assert said in str(refused.value)


def test_a_server_that_says_nothing(monkeypatch):
    monkeypatch.setattr("hadal.tools.mcp_tools._START_S", 5.0)
    with pytest.raises(ConfigError, match="no list of tools within 5 s"):
        asyncio.run(use(server_of(tools_list=None)))


def test_an_error_of_the_block_is_not_wrapped():
    async def fail():
        async with mcp_tools(server_of(tools_list=tools_of())):
            raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        asyncio.run(fail())


@pytest.mark.parametrize(
    "result",
    [{"content": [], "structuredContent": {"n": "x"}}, {"content": []}, {"content": 5}],
)
def test_a_result_that_is_not_as_declared(result):
    number = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    listed = tools_of({"name": "t", "outputSchema": number})
    output = asyncio.run(use(server_of(tools_list=listed, tools_call={"result": result})))
    assert output.failed
    assert output.text.startswith("Error: ")

"""Whatever a model writes into a call: it gets an error that it can act on, and the run goes on."""

import json

import pytest

from hadal.chat import ToolCall
from hadal.tools import BashTool, EditorTool, Toolbox

LONG = "/tmp/" + "a/" * 20_000


def edit(**arguments):
    return "str_replace_editor", json.dumps(arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("bash", json.dumps({"command": "echo a\0b"}), "zero byte"),
        ("bash", '{"command": "echo \\ud800"}', "surrogate"),
        ("bash", '{"command": ["echo"]}', "command"),
        ("bash", '{"command": "echo a", "timeout": 1e999}', "timeout"),
        ("bash", '{"command": "' + "[" * 100_000, "Error"),
        ("bash", "[" * 100_000, "Error"),
        (*edit(command="view", path="/tmp/a\0b"), "zero byte"),
        (*edit(command="view", path=LONG), "too long"),
        (*edit(command="create", path=LONG, file_text="x"), "too long"),
        (*edit(command="create", path="/tmp/" + "é" * 3000, file_text="x"), "too long"),
        (*edit(command="create", path="/tmp/" + "n" * 300, file_text="x"), "too long"),
        (*edit(command="create", path="/proc/self/x", file_text="x"), "Error"),
        (*edit(command="view", path="/etc/passwd", view_range=[1]), "view_range"),
        (*edit(command="view", path="/etc/passwd", view_range=[1, 2, 3]), "view_range"),
        (*edit(command="view", path="/etc/passwd", view_range=[10**400, -1]), "view_range"),
        (*edit(command="view", path="/etc/passwd", view_range=[1.5, 2]), "view_range"),
        (*edit(command="insert", path="/etc/passwd", insert_line=-1, new_str="x"), "insert_line"),
        (*edit(command="insert", path="/etc/passwd", insert_line=10**400, new_str="x"), "insert_line"),
        ("str_replace_editor", '{"command": "create", "path": "/tmp/\\udfff", "file_text": "x"}', "surrogate"),
        ("str_replace_editor", '{"command": "create", "path": "/tmp/x", "file_text": "\\ud83d"}', "surrogate"),
    ],
    ids=range(20),
)  # fmt: skip
def test_an_error_that_says_why(in_box, name, arguments, said):
    async def whole(box):
        toolbox = Toolbox([BashTool(box), EditorTool(box)])
        output = await toolbox.call(ToolCall(name, arguments), "call-0")
        after = await toolbox.call(ToolCall("bash", '{"command": "echo fine"}'), "call-1")
        return output, after.text

    output, after = in_box(whole)
    assert output.failed
    assert said in output.text
    assert len(output.text) < 2000
    assert after.strip() == "fine"

"""What every result goes through on its way to a model."""

import asyncio
import json

import pytest

from hadal.chat import Tool, ToolCall
from hadal.errors import ConfigError, NodeError
from hadal.tools import BashTool, Toolbox, ToolOutput


class Given:
    """A tool that returns or raises what it is given.

    Args:
        outcome: An output, or an error.
        parameters: Of the declaration.
    """

    def __init__(self, outcome, parameters=None):
        self.declaration = Tool.of("given", "Return it.", parameters or {"type": "object"})
        self.outcome = outcome

    async def call(self, arguments, request_id, said):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def ask(tools, request_id="run/1"):
    return asyncio.run(Toolbox(tools).call(ToolCall("given", "{}"), request_id))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no number"), "Error: ValueError: no number"),
        (KeyError(), "Error: KeyError"),
        (ExceptionGroup("all", [ExceptionGroup("of", [OSError("it")])]), "Error: OSError: it"),
    ],
)
def test_what_the_code_of_others_raises_is_told(error, said):
    output = ask([Given(error)])
    assert (output.text, output.failed) == (said, True)


def test_our_errors_are_not_told():
    with pytest.raises(NodeError):
        ask([Given(NodeError("the node is gone"))])


def test_names_of_files_that_are_no_text():
    assert ask([Given(ToolOutput(text="a\udcffb\ud83d"))]).text == "a\ufffdb\ufffd"
    assert ask([Given(ToolOutput(text="a\udcff", fits=True))]).text == "a\ufffd"
    assert ask([Given(ValueError("\udcff"))]).text == "Error: ValueError: \ufffd"


LONG = "first" + "ü" * 500_000 + "last"


@pytest.mark.parametrize("outcome", [ToolOutput(text=LONG), ValueError(LONG)])
def test_a_long_result_without_a_box_is_cut(outcome):
    output = ask([Given(outcome)])
    assert len(output.text.encode()) < 17_000
    assert "first" in output.text
    assert output.text.endswith("last")
    assert output.full_text is None
    assert "are not kept]" in output.text


def test_what_fits_is_as_it_was():
    text = "x" * 16_000
    assert ask([Given(ToolOutput(text=text))]).text == text
    assert ask([Given(ToolOutput(text=text + "y", fits=True))]).text == text + "y"


def test_a_long_result_lies_in_the_box(in_box):
    async def whole(box):
        toolbox = Toolbox([Given(ToolOutput(text=LONG)), BashTool(box)])
        output = await toolbox.call(ToolCall("given", "{}"), "run/1")
        command = json.dumps({"command": "x=1; mkdir /tmp/.hadal/mine"})
        made = await toolbox.call(ToolCall("bash", command), "2")
        kept = await toolbox.call(ToolCall("bash", json.dumps({"command": "echo $x"})), "3")
        return output, await box.files.read(output.full_text), made.text + kept.text

    output, full, state = in_box(whole, user="1234")
    assert full.decode() == LONG
    assert output.full_text == "/tmp/.hadal/result-run-1.txt"
    assert f"all 1,000,009 are in {output.full_text}]" in output.text
    assert state == "(no output)1\n"


def test_a_box_with_no_room_for_the_rest(in_box):
    async def whole(box):
        await box.files.write("/tmp/.hadal", "in the way")
        toolbox = Toolbox([Given(ToolOutput(text=LONG)), BashTool(box)])
        return await toolbox.call(ToolCall("given", "{}"), "1")

    output = in_box(whole)
    assert "could not be kept: " in output.text
    assert (output.full_text, output.failed) == (None, False)


def within(schema):
    return {"type": "object", "properties": {"a": schema}}


@pytest.mark.parametrize(
    "parameters",
    [
        within({"$ref": "http://elsewhere.example/schema"}),
        within({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/none"}]}),
        within({"type": "array", "items": {"$ref": "other.json"}}),
    ],
)
def test_a_schema_that_refers_elsewhere_is_refused_at_once(parameters):
    with pytest.raises(ConfigError, match="schema of tool 'given' refers to"):
        Toolbox([Given(ToolOutput(text=""), parameters)])


@pytest.mark.parametrize(
    "parameters",
    [
        within({"$ref": "#/$defs/b"}) | {"$defs": {"b": {"type": "string"}}},
        within({"$ref": "#/$defs/b"}) | {"$defs": {"b": within({"$ref": "#/$defs/b"})}},
        within({"$ref": "#"}),
        within({"default": {"$ref": "elsewhere"}}),
        {"type": "object", "properties": {"$ref": {"type": "string"}, "$id": {"type": "string"}}},
        within({"$ref": "b"}) | {"$defs": {"b": {"$id": "b", "type": "string"}}},
    ],
)
def test_a_schema_that_refers_to_itself_is_not(parameters):
    assert ask([Given(ToolOutput(text="fine"), parameters)]).text == "fine"

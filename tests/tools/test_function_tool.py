"""Tools made of functions."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial

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


def outcome(function, **settings):
    function.__doc__ = "About."
    toolbox = Toolbox([tool(function, **settings)])
    return asyncio.run(toolbox.call(ToolCall(function.__name__, "{}"), "1"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "Unable to serialize unknown type"),
        (b"\xff", "invalid utf-8"),
        (float, "Unable to serialize"),
    ],
)
def test_what_cannot_be_written_is_told(value, said):
    def give():
        return value

    output = outcome(give)
    assert output.failed
    assert output.text.startswith("Error: ")
    assert said in output.text


def test_names_of_files_that_are_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff")).touch()

    def names():
        return [path.name for path in tmp_path.iterdir()]

    assert outcome(names).text == '["a\ufffd"]'


@pytest.mark.parametrize("error", [StopIteration("over"), SystemExit("over")])
def test_what_no_loop_passes_on_is_told(error):
    def leave():
        raise error

    output = outcome(leave, timeout_s=20.0)
    assert output.failed
    assert f"{type(error).__name__}: over" in output.text


def test_plain_functions_run_side_by_side():
    both = threading.Barrier(2, timeout=20)

    @tool
    def meet(name: str) -> str:
        """Meet the other one."""
        both.wait()
        return name

    async def whole():
        toolbox = Toolbox([meet])
        made = [toolbox.call(ToolCall("meet", json.dumps({"name": n})), n) for n in "ab"]
        return await asyncio.gather(*made)

    assert [output.text for output in asyncio.run(whole())] == ["a", "b"]


def test_a_late_function_is_not_waited_for():
    ended = threading.Event()

    @partial(tool, timeout_s=0.1)
    def late() -> str:
        """Wait."""
        ended.wait(60)
        return "late"

    async def slow():
        await asyncio.sleep(60)

    began = time.monotonic()
    output = asyncio.run(Toolbox([late]).call(ToolCall("late", "{}"), "1"))
    ended.set()
    assert (output.text, output.failed) == ("Error: it did not return within 0.1 s", True)
    assert outcome(slow, timeout_s=0.1).text == "Error: it did not return within 0.1 s"
    assert time.monotonic() - began < 30


def test_a_timeout_of_its_own_is_its_own():
    def reach():
        raise TimeoutError("no answer there")

    assert outcome(reach).text == "Error: TimeoutError: no answer there"


PROGRAM = """
import asyncio, threading
from hadal.chat import ToolCall
from hadal.tools import Toolbox, tool
def hang():
    "Hang."
    threading.Event().wait()
toolbox = Toolbox([tool(hang, timeout_s=0.1)])
print(asyncio.run(toolbox.call(ToolCall("hang", "{}"), "1")).text)
"""


def test_the_program_ends_though_a_function_does_not():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("Error: it did not return within 0.1 s\n", "")


def test_what_is_no_tool():
    def silent(a: int): ...

    def bare(a):
        """About."""

    for function, said in ((silent, "no docstring"), (bare, "parameter a has no annotation")):
        with pytest.raises(ConfigError, match=said):
            tool(function)
    with pytest.raises(ConfigError, match="same name"):
        Toolbox([add, add])

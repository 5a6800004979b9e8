"""`str_replace_editor`."""

import json

import pytest

from hadal.chat import ToolCall
from hadal.tools import EditorTool, Toolbox


def call(command, path="/tmp/f", **arguments):
    return ToolCall(
        "str_replace_editor", json.dumps({"command": command, "path": path, **arguments})
    )


def edit(in_box, *calls, content=None, path="/tmp/f"):
    async def whole(box):
        toolbox = Toolbox([EditorTool(box)])
        if content is not None:
            await box.files.write(path, content)
        outputs = [await toolbox.call(c, f"call-{at}") for at, c in enumerate(calls)]
        left = await box.files.read(path) if await box.files.exists(path) else None
        return outputs, left

    return in_box(whole)


def test_create_and_view(in_box):
    outputs, left = edit(
        in_box, call("create", file_text="a\nb"), call("view"), call("create", file_text="")
    )
    assert [o.text for o in outputs] == [
        "Created: /tmp/f",
        "     1\ta\n     2\tb",
        "Overwritten: /tmp/f",
    ]
    assert left == b""


def test_replace(in_box):
    content = "".join(f"line {n}\n" for n in range(1, 11))
    outputs, left = edit(
        in_box, call("str_replace", old_str="line 5\n", new_str="five\nmore\n"), content=content
    )
    assert left.decode() == content.replace("line 5\n", "five\nmore\n")
    assert outputs[0].text.splitlines()[:5] == [
        "Edited: /tmp/f", "     2\tline 2", "     3\tline 3", "     4\tline 4", "     5\tfive",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (call("str_replace", old_str="nothing", new_str=""), "old_str is not in"),
        (call("str_replace", old_str="a", new_str="b"), "old_str is 2 times in"),
        (call("str_replace", old_str="", new_str="b"), "old_str is empty"),
        (call("str_replace", new_str="b"), "str_replace needs old_str"),
        (call("insert", insert_line=9, new_str="b"), "insert_line must be 0 to 2, got 9"),
        (call("view", view_range=[2, 5]), "view_range [2, 5] is not within the 2 lines"),
        (call("view", path="/nothing"), "No such file"),
        (call("view", path="relative"), "path must be absolute"),
        (call("undo"), "\n- command: expected one of"),
        (call("view", depth=1), 'unknown: "depth"; known: '),
        (ToolCall("str_replace_editor", "not json"), "not JSON"),
        (ToolCall("edit", "{}"), 'there is no tool "edit"; the tools are: str_replace_editor'),
    ],
)
def test_what_cannot_be_done_is_told(in_box, asked, said):
    outputs, left = edit(in_box, asked, content="a\na\n")
    assert outputs[0].failed
    assert outputs[0].text.startswith("Error: ")
    assert said in outputs[0].text
    assert left == b"a\na\n"


@pytest.mark.parametrize(
    ("content", "line", "text", "expected"),
    [
        ("a\nb\n", 0, "x", "x\na\nb\n"),
        ("a\nb\n", 1, "x\ny\n", "a\nx\ny\nb\n"),
        ("a\nb\n", 2, "x", "a\nb\nx"),
        ("a\nb", 2, "x\n", "a\nb\nx\n"),
        ("", 0, "x\n", "x\n"),
    ],
)
def test_insert(in_box, content, line, text, expected):
    _, left = edit(in_box, call("insert", insert_line=line, new_str=text), content=content)
    assert left.decode() == expected


def test_directories_and_bytes(in_box):
    async def whole(box):
        toolbox = Toolbox([EditorTool(box)])
        await box.files.write("/tmp/d/a.txt", "x", parents=True)
        await box.files.write("/tmp/d/b.bin", b"\xff\xfe")
        listed = await toolbox.call(call("view", path="/tmp/d"), "1")
        binary = await toolbox.call(call("view", path="/tmp/d/b.bin"), "2")
        return listed.text, binary.text

    listed, binary = in_box(whole)
    assert listed.split() == ["/tmp/d", "/tmp/d/a.txt", "/tmp/d/b.bin"]
    assert binary == "Error: /tmp/d/b.bin is no text: use bash"


@pytest.mark.parametrize("new", ["b", "aa"])
def test_the_same_edit_is_made_once(in_box, new):
    async def whole(box):
        toolbox = Toolbox([EditorTool(box)])
        await box.files.write("/tmp/f", "a")
        outputs = [
            await toolbox.call(call("str_replace", old_str="a", new_str=new), "same")
            for _ in range(2)
        ]
        return await box.files.read("/tmp/f"), outputs

    left, outputs = in_box(whole)
    assert left == new.encode()
    assert not any(o.failed for o in outputs)

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
        (call("view", path="/dev/zero"), "/dev/zero is a device, no regular file: use bash"),
        (call("create", path="/dev/null", file_text=""), "/dev/null is a device"),
        (call("str_replace", path="/proc/self", old_str="a", new_str=""), "is a directory"),
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
        ("a\rb\u2028c\nd\n", 1, "x", "a\rb\u2028c\nx\nd\n"),
        ("a\r\nb\r\n", 1, "x\r\n", "a\r\nx\r\nb\r\n"),
        ("\n\n", 1, "x", "\nx\n\n"),
        ("a\nb\n", 1.0, "x", "a\nx\nb\n"),
    ],
)
def test_insert(in_box, content, line, text, expected):
    _, left = edit(in_box, call("insert", insert_line=line, new_str=text), content=content)
    assert left.decode() == expected


ODD = "a\rb\fc\u2028d\x1ce\nsecond\nthird"


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_are_numbered_as_grep_does(in_box, end):
    outputs, _ = edit(
        in_box,
        call("view"),
        call("view", view_range=[2.0, 3.0]),
        call("view", view_range=[3, -1]),
        call("view", view_range=[1, 4]),
        call("insert", insert_line=3, new_str="fourth\n\n"),
        call("str_replace", old_str="second", new_str="2"),
        content=ODD + end,
    )
    assert outputs[0].text == "     1\ta\rb\fc\u2028d\x1ce\n     2\tsecond\n     3\tthird"
    assert outputs[1].text == "     2\tsecond\n     3\tthird"
    assert outputs[2].text == "     3\tthird"
    assert "is not within the 3 lines" in outputs[3].text
    assert outputs[4].text.endswith("\n     3\tthird\n     4\tfourth\n     5\t")
    assert "\n     2\t2\n     3\tthird\n" in outputs[5].text


def test_what_has_no_end_is_not_read(in_box):
    async def whole(box):
        await box.run("mkfifo /tmp/pipe; ln -s /dev/zero /tmp/zero; ln -s zero /tmp/again")
        toolbox = Toolbox([EditorTool(box)])
        asked = [call(c, path=f"/tmp/{p}", file_text="") for p in ("pipe", "again") for c in ("view", "create")]  # fmt: skip
        asked += [call("view", path=p) for p in ("/proc/self/status", "/proc/sys/kernel/ostype")]
        return [(await toolbox.call(c, f"call-{at}")).text for at, c in enumerate(asked)]

    *refused, status, kernel = in_box(whole)
    assert refused[:2] == ["Error: /tmp/pipe is a FIFO, no regular file: use bash"] * 2
    assert refused[2:] == ["Error: /tmp/again is a device, no regular file: use bash"] * 2
    assert status.startswith("     1\tName:")
    assert kernel == "     1\tLinux"


def test_a_file_that_is_too_long(in_box):
    outputs, _ = edit(
        in_box,
        call("str_replace", old_str="once", new_str="twice"),
        call("view"),
        content="once " + "x" * 2_000_000,
    )
    for output in outputs:
        assert len(output.text) < 17_000
        assert "are in /tmp/.hadal/result-call-" in output.text
        assert output.full_text in output.text

    async def huge(box):
        await box.run("truncate -s 10T /tmp/huge")
        return (await Toolbox([EditorTool(box)]).call(call("view", path="/tmp/huge"), "1")).text

    assert in_box(huge) == "Error: /tmp/huge has 10,995,116,277,760 bytes: use bash on parts of it"


def listed(in_box, prepare, *paths, **changes):
    async def whole(box):
        await box.run(prepare, user="0")
        toolbox = Toolbox([EditorTool(box)])
        return [await toolbox.call(call("view", path=p), f"call-{p}") for p in paths]

    return in_box(whole, **changes)


def test_directories_that_lie_in_hidden_ones_or_behind_links(in_box):
    prepare = (
        "mkdir -p /x/.config/app/.git /x/.config/app/d/e/f '/x/[a]'; cd /x/.config/app;"
        "touch a .hidden .git/b d/c d/e/f/deep '/x/[a]/f'; ln -s /x/.config/app /link"
    )
    hidden, link, odd, above, empty = listed(
        in_box, prepare, "/x/.config/app", "/link", "/x/[a]", "/x/.config/app/..", "/x/.config/app/.git/",
    )  # fmt: skip
    assert hidden.text.split() == [f"/x/.config/app{p}" for p in ("", "/a", "/d", "/d/c", "/d/e")]
    assert link.text.split() == [f"/link{p}" for p in ("", "/a", "/d", "/d/c", "/d/e")]
    assert odd.text.split() == ["/x/[a]", "/x/[a]/f"]
    assert above.text.split()[1:4] == [f"/x/.config/app/../app{p}" for p in ("", "/a", "/d")]
    assert empty.text.split() == ["/x/.config/app/.git/", "/x/.config/app/.git/b"]
    assert not any(o.failed for o in (hidden, link, odd, above, empty))


def test_a_listing_that_fails_says_so(in_box):
    prepare = "mkdir -p /x/closed; touch /x/a; chmod 700 /x/closed"
    [output] = listed(in_box, prepare, "/x", user="1234")
    assert output.failed
    assert output.text.startswith("/x\n/x/a\n/x/closed\n")
    assert "Permission denied" in output.text


def test_a_long_listing_is_cut(in_box):
    [output] = listed(in_box, "mkdir /x; cd /x; seq -f %0100g 1 400 | xargs touch", "/x")
    assert len(output.text) < 17_000
    assert "bytes left out here" in output.text


def test_a_box_without_find(in_box, tmp_path):
    (tmp_path / "bin").mkdir()

    async def whole(box):
        return (await Toolbox([EditorTool(box)]).call(call("view", path="/bin"), "1")).text

    assert in_box(whole, image=str(tmp_path)).startswith("Error: find was not started")


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

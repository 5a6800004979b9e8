"""`bash`: a shell whose state lives on, though every call is a command of its own."""

import asyncio
import json

import pytest

from hadal.chat import ToolCall
from hadal.tools import BashTool, Toolbox


def call(command):
    return ToolCall("bash", json.dumps({"command": command}))


async def texts(box, *commands, **settings):
    toolbox = Toolbox([BashTool(box, **settings)])
    return [
        (await toolbox.call(call(command), f"call-{at}")).text
        for at, command in enumerate(commands)
    ]


@pytest.mark.parametrize(
    ("commands", "last"),
    [
        (["cd /usr && x=1", "echo $PWD $x"], "/usr 1\n"),
        (["export A='a b\n\"c'", "printenv A"], 'a b\n"c\n'),
        (["f() { echo \"f: $1\"; }", "f 2"], "f: 2\n"),
        (["a=(1 'two 2' 3); declare -A m=([k]=v)", 'echo "${a[1]} ${#a[@]} ${m[k]}"'], "two 2 3 v\n"),
        (["alias hi='echo hello'", "hi"], "hello\n"),
        (["shopt -s nullglob; set -u", "echo /nothing/*; echo $unset"], None),
        (["readonly R=1; y=2", "echo $y"], "2\n"),
        (["cd /tmp; mkdir gone; cd gone; rmdir /tmp/gone", "pwd"], None),
        (["cd /usr", "cd /tmp", "cd -"], "/usr\n"),
        (["z=3; exit 4", "echo $z"], "3\n"),
        (["set -e; false; echo never", "set +e; echo on"], "on\n"),
        (["echo 'umlaut: ü €'"], "umlaut: ü €\n"),
        (["IFS=,; export FOO=1; f() { echo f; }", "a=1,2; set -- $a; echo $# $FOO; f"], "2 1\nf\n"),
        (["unset IFS; x=1", "a='1 2'; set -- $a; echo $# $x"], "2 1\n"),
        (["name=a code=b options=c", "echo $name $code $options"], "a b c\n"),
    ],
)  # fmt: skip
def test_state(in_box, commands, last):
    found = in_box(lambda box: texts(box, *commands))
    if last is not None:
        assert found[-1] == last
    else:
        assert found[-1]


def test_messages(in_box):
    found = in_box(
        lambda box: texts(
            box,
            "nosuchcommand",
            "echo a; echo b >&2; echo c",
            "false",
            "true",
            "printf x; exit 3",
            "if",
            "echo one\nnosuch\necho two",
            "kill -9 $$",
            "echo $# $0",
            "cat",
        )
    )
    assert found == [
        "bash: line 1: nosuchcommand: command not found\n[exit code 127]",
        "a\nb\nc\n",
        "[exit code 1]",
        "(no output)",
        "x\n[exit code 3]",
        found[5],
        "one\nbash: line 2: nosuch: command not found\ntwo\n",
        "[exit code 137]",
        "0 bash\n",
        "(no output)",
    ]
    assert "syntax error" in found[5]


def test_timeout_keeps_output_and_state(in_box):
    first, late, after = in_box(
        lambda box: texts(
            box, "x=before", "x=after; echo started; sleep 30", "echo $x", timeout_s=0.5
        )
    )
    assert first == "(no output)"
    assert late == "started\n[killed after 0.5 s; the shell is as it was before this command]"
    assert after == "before\n"


def test_processes_in_the_background_live_on(in_box):
    found = in_box(
        lambda box: texts(
            box,
            "sleep 60 >/dev/null 2>&1 & echo $! >/tmp/pid",
            "kill -0 $(cat /tmp/pid) && echo lives",
        )
    )
    assert found[1] == "lives\n"


def test_long_output_is_cut_and_lies_in_the_box(in_box):
    async def whole(box):
        toolbox = Toolbox([BashTool(box)])
        output = await toolbox.call(call("seq 1000000"), "long")
        return output, await box.files.read(output.full_text)

    output, full = in_box(whole)
    assert full == b"".join(b"%d\n" % n for n in range(1, 1000001))
    assert len(output.text) < 17000
    assert output.text.startswith("1\n2\n")
    assert output.text.endswith("999999\n1000000\n")
    assert f"all 6,888,896 are in {output.full_text}]" in output.text


def test_the_same_call_runs_once(in_box):
    async def whole(box):
        toolbox = Toolbox([BashTool(box)])
        for _ in range(2):
            output = await toolbox.call(call("echo x >>/tmp/f; wc -l </tmp/f"), "same")
        return output.text

    assert in_box(whole) == "1\n"


def test_sessions_are_apart(in_box):
    async def whole(box):
        one, two = (Toolbox([BashTool(box, session=name)]) for name in ("one", "two"))
        await one.call(call("x=1; cd /usr"), "a")
        return (await two.call(call("echo [$x] $PWD"), "b")).text

    assert in_box(whole) == "[] /\n"


def test_calls_side_by_side_leave_a_whole_state(in_box):
    many = "for n in $(seq 1 3000); do declare -g v_$n=$1; done"
    look = "set | grep ^v_ | cut -d= -f2 | sort | uniq -c"

    async def whole(box):
        toolbox, found = Toolbox([BashTool(box)]), []
        for turn in range(5):
            pair = [(f"set -- {x}; {many}", f"{turn}-{x[0]}") for x in ("a" * 20, "b" * 300)]
            await asyncio.gather(*(toolbox.call(call(text), name) for text, name in pair))
            found.append((await toolbox.call(call(look), f"{turn}")).text.split())
        return found, await box.run("ls /tmp/.hadal")

    found, left = in_box(whole)
    assert all(each in (["3000", "a" * 20], ["3000", "b" * 300]) for each in found)
    assert left.stdout.split() == ["bash-main"]


def test_no_bash(in_box, tmp_path):
    (tmp_path / "bin").mkdir()
    found = in_box(lambda box: texts(box, "true"), image=str(tmp_path))
    assert found[0].startswith("Error: the command was not started")


async def said(box, command):
    """Return the pieces that were told of a command, and its output."""
    pieces: list[str] = []
    output = await Toolbox([BashTool(box)]).call(call(command), "watched", pieces.append)
    return pieces, output.text


def test_what_is_printed_is_told_while_it_runs(in_box):
    pieces, text = in_box(lambda box: said(box, "echo one; sleep 2.5; echo ü; sleep 2"))
    assert pieces == ["one\n", "ü\n"]
    assert text == "one\nü\n"


def test_quick_commands_are_not_told(in_box):
    assert in_box(lambda box: said(box, "echo quick")) == ([], "quick\n")


def test_no_more_is_told_than_people_read(in_box):
    pieces, text = in_box(lambda box: said(box, "yes | head -c 3000000; sleep 2"))
    assert len("".join(pieces)) == 16_000
    assert "bytes left out here" in text

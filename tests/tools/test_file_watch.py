"""What calls did to files, as people are shown it."""

import asyncio
import json

from hadal.chat import ToolCall
from hadal.sandbox import AsyncSandbox, ContainerSpec
from hadal.tools import BashTool, EditorTool, FileWatch, Toolbox


def files_of(*commands):
    """What is said of the files after each command."""

    async def main():
        async with await AsyncSandbox.create(ContainerSpec()) as box:
            await box.files.mkdir("/here")
            await box.files.write("/here/old.txt", "one\ntwo\nthree\n")
            await box.files.write("/here/gone.txt", "bye\n")
            toolbox = Toolbox([BashTool(box), EditorTool(box)], FileWatch(box))
            found = []
            for number, command in enumerate(commands):
                name = "bash" if isinstance(command, str) else "str_replace_editor"
                given = {"command": command} if isinstance(command, str) else command
                call = ToolCall(name, json.dumps(given), id=str(number))
                output = await toolbox.call(call, str(number))
                found.append({f.path: (f.kind, f.diff) for f in output.files})
            return found

    return asyncio.run(main())


def test_what_is_written_changed_and_removed(node):
    first, second, third, fourth = files_of(
        "cd /here; sed -i s/two/2/ old.txt; rm gone.txt; echo new > new.txt; rm /etc/group",
        "true",
        {"command": "str_replace", "path": "/here/new.txt", "old_str": "new", "new_str": "newer"},
        "rm /here/new.txt; printf 'a\\0b' > /here/binary; seq 1 100000 > /here/long; echo x >> /etc/passwd",
    )
    assert first == {
        "/etc/group": ("removed", ""),
        "/here/gone.txt": ("removed", "@@ -1 +0,0 @@\n-bye"),
        "/here/old.txt": ("changed", "@@ -1,3 +1,3 @@\n one\n-two\n+2\n three"),
        "/here/new.txt": ("written", "@@ -0,0 +1 @@\n+new"),
    }
    assert second == {}
    assert third == {"/here/new.txt": ("changed", "@@ -1 +1 @@\n-new\n+newer")}
    assert fourth["/here/new.txt"] == ("removed", "@@ -1 +0,0 @@\n-newer")
    assert (fourth["/here/binary"], fourth["/here/long"]) == (("written", ""), ("written", ""))
    kind, diff = fourth["/etc/passwd"]
    assert (kind, diff.endswith("+x")) == ("written", True)


def test_what_is_no_file_is_not_read(node):
    first, second = files_of(
        "cd /here; mkfifo pipe; ln -s /dev/zero zero; ln -s pipe link; rm old.txt; mkfifo old.txt",
        "echo on > /here/new.txt",
    )
    assert first == {
        "/here/pipe": ("written", ""),
        "/here/zero": ("written", ""),
        "/here/link": ("written", ""),
        "/here/old.txt": ("changed", ""),
    }
    assert second == {"/here/new.txt": ("written", "@@ -0,0 +1 @@\n+on")}


def test_very_many_files_are_not_looked_at(node):
    assert files_of("mkdir /m; cd /m; seq 1 3000 | xargs touch", "touch /here/a") == [{}, {}]

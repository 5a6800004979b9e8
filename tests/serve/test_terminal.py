"""`hadal chat` as a user has it: typed lines in, reasoning, calls and answers out."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.golden.data import tokenizer_file
from tests.serve.fake_upstream import DONE, ended, said, upstream
from tests.serve.fixtures import TOOLS, answer, call, encoding, scripted, serving

HADAL = str(Path(sys.executable).parent / "hadal")

ON_A_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
"""Ctrl-C on a terminal is a signal for those whose controlling terminal it is."""

OWNED = "\x1b]0;owned\x07"


def over(url, *more):
    tokenizer = str(tokenizer_file())
    return [HADAL, "chat", "--upstream", url, "--tokenizer", tokenizer, "--generation", "v4", *more]


def talked(url, typed, *more):
    result = subprocess.run(
        over(url, *more), input=typed, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_conversation_with_a_tool(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    front = scripted(call("ls", thought="I look."), answer("One \x1b[2J[red]file."), answer("Bye."))
    with serving(front) as url:
        shown = talked(
            url, "List the files.\na.txt\n\nThanks.\n",
            "--tools", str(tmp_path / "tools.json"), "--system", "Be brief.",
        )  # fmt: skip
    for text in (
        "I look.",
        'run {"command": "ls"}',
        "result of run>",
        "[red]file.",
        "Bye.",
        "stop]",
    ):
        assert text in shown
    assert "\x1b" not in shown
    prompts = [encoding().decode(ids) for ids in front.backend.inner.prompts]
    assert "Be brief." in prompts[0]
    assert "<tool_result>a.txt</tool_result>" in prompts[1]
    assert prompts[2].endswith("<｜User｜>Thanks.<｜Assistant｜><think>")


def test_wrong_tools_file(tmp_path):
    (tmp_path / "tools.json").write_text("{")
    command = [HADAL, "chat", "x", "--tools", str(tmp_path / "tools.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--tools" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_that_a_model_or_a_server_writes_steers_the_terminal(tmp_path):
    """Names of calls, bodies of errors, and numbers that are none."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    hostile = {"prompt_tokens_details": {"cached_tokens": OWNED}}
    called = [said("".join(call("ls", tool=f"x{OWNED}"))), {"usage": hostile}, DONE]
    broken = [{"error": f"broken {OWNED}"}]
    replies = called, (500, f"refused {OWNED}".encode()), broken, [said("</think>Bye."), DONE]
    with upstream(*replies) as fake:
        shown = talked(
            fake.url, "List.\na.txt\nAgain.\nAnd again.\n", "--tools", str(tmp_path / "tools.json")
        )
    escaped = "\\x1b]0;owned\\x07"
    assert f"result of x{escaped}> " in shown
    assert f"{escaped} of them cached" in shown
    assert f"refused {escaped}" in shown
    assert "broken" in shown
    assert "Bye." in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_an_error_takes_the_whole_turn_back(tmp_path):
    """A call that has no result would be refused, or made up for, in every turn to come."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    called = [said("".join(call("ls"))), ended(), DONE]
    replies = called, (500, b"no"), [said("Easy.</think>Hello."), ended(), DONE]
    with upstream(*replies) as fake:
        shown = talked(
            fake.url, "List.\na.txt\nHello.\n",
            "--tools", str(tmp_path / "tools.json"), "--upstream-takes", "text",
        )  # fmt: skip
    assert "500" in shown
    assert "Hello." in shown
    assert "a.txt" in fake.asked[1]["prompt"]
    assert fake.asked[2]["prompt"].endswith("<｜User｜>Hello.<｜Assistant｜><think>")
    assert fake.asked[2]["prompt"].count("<｜User｜>") == 1
    assert "List." not in fake.asked[2]["prompt"]


class Screen:
    """A program on a terminal, seen and typed to from its other end."""

    def __init__(self, command):
        self.master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def expect(self, text, limit_s=60):
        deadline = time.monotonic() + limit_s
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode()
                except OSError:  # nobody is left at the other end
                    pytest.fail(f"ended with {self.process.wait()}: {self.seen}")

    def expect_prompt(self, text):
        """Wait until it reads, too: the C library does not notice a signal just before that."""
        self.expect(text)
        while Path(f"/proc/{self.process.pid}/stat").read_text().split()[2] != "S":
            time.sleep(0.01)

    def type(self, keys):
        os.write(self.master, keys)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@contextmanager
def screen(command):
    shown = Screen(command)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.parametrize("prompt", ["you> ", "result of run> "])
def test_ctrl_c_at_a_prompt_ends_it_at_once(prompt, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    with (
        upstream([said("".join(call("ls"))), ended(), DONE]) as fake,
        screen(over(fake.url, "--tools", str(tmp_path / "tools.json"))) as shown,
    ):
        shown.expect_prompt("you> ")
        if prompt != "you> ":
            shown.type(b"List.\n")
            shown.expect_prompt(prompt)
        shown.type(b"\x03")
        assert shown.process.wait(timeout=30) == 130  # it was for ever
        assert "Traceback" not in shown.seen


def test_ctrl_c_during_an_answer_ends_it():
    front = scripted(answer("Well, " * 1000), delay_s=0.05)
    with serving(front) as url, screen(over(url)) as shown:
        shown.expect("you> ")
        shown.type(b"Talk.\n")
        shown.expect("Well, Well,")
        shown.type(b"\x03")
        assert shown.process.wait(timeout=30) == 130
        assert "Traceback" not in shown.seen

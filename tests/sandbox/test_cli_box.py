"""`hadal box`: boxes from the command line, with pipes, a terminal, and errors that help."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time

import pytest

from tests.sandbox.command_line import HADAL, CommandLine
from tests.sandbox.conftest import needs_root

pytestmark = needs_root


@pytest.fixture(scope="module")
def hadal(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    yield line
    line("node", "stop", "--end-boxes")
    assert "not running" in line.text("node", "status", code=1)


@pytest.fixture(scope="module")
def box(hadal):
    return hadal.text("box", "create", "--name", "work", "--memory", "256MiB").strip()


def read_until(descriptor, text, limit_s=20):
    seen, deadline = b"", time.monotonic() + limit_s
    while text not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([descriptor], [], [], 0.1)[0]:
            seen += os.read(descriptor, 65536)
    return seen


def log_has(hadal, box, text, limit_s=20):
    deadline = time.monotonic() + limit_s
    while text not in hadal.text("box", "log", box):
        assert time.monotonic() < deadline


def test_create_again_by_name(hadal, box):
    made = json.loads(hadal.text("box", "create", "--name", "work", "--json"))
    assert made["id"] == box
    assert made["state"] == "running"


@pytest.mark.slow
def test_what_was_asked_for_is_what_it_has(hadal, tmp_path):
    (tmp_path / "file").write_text("mounted")
    box = hadal.text(
        "box", "create", "--ttl", "1h", "--idle", "90s", "--pids", "64", "--cpus", "0.5",
        "--env", "A=1=2", "--label", "task=7", "--mount", f"{tmp_path}:/data",
    ).strip()  # fmt: skip
    try:
        assert hadal.text("box", "run", box, "-c", 'echo "$A"; cat /data/file') == "1=2\nmounted"
        hadal("box", "run", box, "-c", "echo x > /data/file 2>/dev/null", code=2)
        rows = [json.loads(line) for line in hadal.text("box", "ls", "--json").splitlines()]
        assert [r["labels"] for r in rows if r["id"] == box] == [{"task": "7"}]
    finally:
        assert hadal.text("box", "rm", box) == f"{box}\n"
    assert "is gone: killed" in hadal.refused("box", "run", box, "--", "true")


def test_streams_and_exit_code(hadal, box):
    result = hadal("box", "run", "work", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")


def test_options_of_a_command_are_its_own(hadal, box):
    assert hadal.text("box", "run", box[:6], "--", "echo", "--user", "-x", "--") == "--user -x --\n"
    options = ("--env", "A=b", "--cwd", "/tmp", "--user", "1000:1000")
    said = hadal.text("box", "run", "work", *options, "-c", "echo $A $PWD $(id -u)")
    assert said == "b /tmp 1000\n"


def test_binary_input_comes_out_again(hadal, box):
    data = os.urandom(3_000_000)
    assert hadal("box", "run", "work", "--", "cat", stdin=data).stdout == data


def test_input_that_nobody_reads(hadal, box):
    assert hadal.text("box", "run", "work", "--", "head", "-c", "3", stdin=b"abc" * 10**6) == "abc"
    assert hadal.text("box", "run", "work", "--no-stdin", "--", "cat", stdin=b"x") == ""


@pytest.mark.slow
def test_a_slow_reader_gets_all_of_it(hadal, box):
    """The command has long ended, and the node has put its output elsewhere."""
    process = hadal.start(
        "box", "run", "work", "--no-stdin", "-c", "head -c 2000000 /dev/zero",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    log_has(hadal, box, "head -c 2000000")
    while any("BEGUN" in line for line in hadal.text("box", "log", box).splitlines()[-1:]):
        time.sleep(0.05)
    assert len(process.communicate(timeout=30)[0]) == 2_000_000
    assert process.returncode == 0


def test_a_reader_that_leaves(hadal, box):
    process = hadal.start("box", "run", "work", "--no-stdin", "--", "yes", stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(timeout=20) == 0


def test_output_comes_as_it_is_written(hadal, box):
    process = hadal.start(
        "box", "run", "work", "-c", "echo first; read x; echo $x", stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"first\n"
    assert process.communicate(b"second\n", timeout=20)[0] == b"second\n"


def test_without_standard_input(hadal, box):
    command = f"{HADAL} box run work -- cat <&-"
    result = subprocess.run(
        command, shell=True, env=hadal.environment, capture_output=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, b"")


def test_missing_output_is_said(hadal, box):
    said = hadal("box", "run", "work", "--output-limit", "4KiB", "-c", "seq 20000", code=3)
    assert b"output is missing" in said.stderr
    assert said.stdout.endswith(b"20000\n")


def test_timeout(hadal, box):
    began = time.monotonic()
    result = hadal("box", "run", "work", "--timeout", "500ms", "-c", "echo a; sleep 60", code=124)
    assert result.stdout == b"a\n"
    assert b"timed out after 0.5 s" in result.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_reaches_the_command(hadal, box, number):
    line = f"trap 'echo caught; exit 9' {number}; echo ready; while :; do sleep 0.05; done"
    process = hadal.start("box", "run", "work", "-c", line, stdout=subprocess.PIPE, stdin=-3)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == b"caught\n"
    assert process.returncode == 9


@pytest.mark.slow
def test_second_interrupt_kills(hadal, box):
    line = "trap '' 2; echo ready; while :; do sleep 0.05; done"
    process = hadal.start("box", "run", "work", "-c", line, stdout=subprocess.PIPE, stdin=-3)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == b""
    assert process.returncode == 128 + signal.SIGKILL


def test_a_box_for_one_command(hadal):
    name = hadal.text("box", "run", "--image", "host", "-c", "hostname").strip()
    assert name not in hadal.text("box", "ls")
    assert "exit 0" in hadal.text("box", "log", name)


@pytest.mark.slow
def test_a_box_for_one_command_ends_with_us(hadal):
    process = hadal.start(
        "box", "run", "--image", "host", "-c", "hostname; exec sleep 60", stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    name = process.stdout.readline().strip()
    assert name in hadal.text("box", "ls")
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert name not in hadal.text("box", "ls")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nosuch", "--", "true"], 3, "hint: `hadal box ls`"),
        (["run", "work", "--", "/no/such"], 127, "No such file or directory"),
        (["run", "work", "--", "/etc/passwd"], 126, "Permission denied"),
        (["run", "work"], 2, "expected a command"),
        (["run"], 2, "expected a box"),
        (["run", "--image", "/no/such/folder", "--", "true"], 3, "/no/such/folder"),
        (["create", "--network", "none", "--allow", "pypi"], 2, "without a network"),
        (["run", "work", "--env", "A", "--", "true"], 2, "expected NAME=VALUE, got 'A'"),
        (["run", "work", "--timeout", "soon", "--", "true"], 2, "expected a duration"),
        (["create", "--memory", "1MiB"], 2, "memory_mb"),
        (["create", "--memory", "2kB"], 2, "at least 1MiB"),
        (["create", "--mount", "/a"], 2, "SOURCE:TARGET"),
        (["cp", "a", "b"], 2, "neither side is in a box"),
        (["cp", "work:etc", "."], 2, "hint: work:/etc, or ./work:etc"),
        (["cp", "/no/such", "work:/tmp"], 2, "no such file"),
        (["cp", "work:/no/such", "-"], 3, "No such file"),
        (["rm"], 2, "or --all"),
        (["rm", "nosuch"], 3, "no box 'nosuch'"),
        (["log", "nosuch"], 3, "no box 'nosuch'"),
        (["shell", "work"], 2, "hint: `hadal box run"),
    ],
)
def test_wrong_input(hadal, box, arguments, code, message):
    assert message in hadal.refused("box", *arguments, code=code)


class Terminal:
    """A command with a terminal, driven from its other end."""

    def __init__(self, hadal, *arguments):
        self.master, slave = pty.openpty()
        self.resize(30, 90, tell=False)
        self.before = termios.tcgetattr(slave)
        self.process = hadal.start(*arguments, stdin=slave, stdout=slave, stderr=slave)
        self.slave = slave

    def resize(self, rows, columns, tell=True):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def type(self, text):
        os.write(self.master, text)

    def expect(self, text):
        return read_until(self.master, text)

    def end(self):
        code = self.process.wait(timeout=20)
        restored = termios.tcgetattr(self.slave) == self.before
        os.close(self.master)
        os.close(self.slave)
        return code, restored


def test_shell(hadal, box):
    terminal = Terminal(hadal, "box", "shell", "work")
    terminal.type(b"stty size; echo do''ne\r")
    assert b"30 90" in terminal.expect(b"done")
    terminal.resize(41, 101)
    time.sleep(0.3)
    terminal.type(b"stty size; echo do''ne\r")
    assert b"41 101" in terminal.expect(b"done")
    # It says itself that it runs: a key before that would reach the shell.
    terminal.type(b'python3 -c \'import time; print("ru" + "ns", flush=True); time.sleep(60)\'\r')
    terminal.expect(b"runs")
    terminal.type(b"\x03echo inter''rupted; exit 5\r")  # Ctrl-C is the box's, not ours
    terminal.expect(b"interrupted")
    assert terminal.end() == (5, True)


@pytest.mark.slow
def test_leave_a_shell_and_come_back(hadal, box):
    terminal = Terminal(hadal, "box", "shell", "work", "--", "sh", "-c", "read a; echo got $a")
    log_has(hadal, box, "BEGUN")
    terminal.type(b"\x1d")
    said = terminal.expect(b"comes back")
    assert terminal.end() == (0, True)
    number = said.split(b"--attach ")[1].split(b"`")[0].decode()
    terminal = Terminal(hadal, "box", "shell", "work", "--attach", number)
    terminal.type(b"back\r")
    terminal.expect(b"got back")
    assert terminal.end() == (0, True)


def test_terminal_is_restored_when_we_are_told_to_end(hadal, box):
    terminal = Terminal(hadal, "box", "shell", "work", "--", "sh", "-c", "echo up; sleep 5")
    terminal.expect(b"up")
    terminal.process.terminate()
    assert terminal.end()[1]


@pytest.mark.slow
def test_copies(hadal, box, tmp_path):
    data = os.urandom(500_000)
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_bytes(data)
    (tree / "link").symlink_to("deep/file")
    (tree / "deep" / "file").chmod(0o750)
    hadal("box", "cp", tree, "work:/new")  # made, with the content
    hadal("box", "cp", tree, "work:/tmp")  # into it
    hadal("box", "cp", tree / "deep" / "file", "work:/tmp/renamed")
    said = hadal.text(
        "box", "run", "work", "-c", "cd /; stat -c %a:%s new/deep/file tmp/tree/deep/file"
    )
    assert said == "750:500000\n750:500000\n"
    out = tmp_path / "out"
    hadal("box", "cp", "work:/new", out)
    assert (out / "link").read_bytes() == data
    hadal("box", "cp", "work:/tmp/renamed", out)
    assert (out / "renamed").read_bytes() == data
    assert (out / "renamed").stat().st_mode & 0o777 == 0o750
    with tarfile.open(fileobj=io.BytesIO(hadal("box", "cp", "work:/new", "-").stdout)) as packed:
        assert "./deep/file" in packed.getnames()
    stream = hadal("box", "cp", "work:/new", "-").stdout
    hadal("box", "cp", "-", "work:/again", stdin=stream)
    assert "deep" in hadal.text("box", "run", "work", "--", "ls", "/again")
    hadal("box", "cp", "work:/again", "work:/third")
    assert "deep" in hadal.text("box", "run", "work", "--", "ls", "/third")


@pytest.mark.slow
def test_log(hadal, box):
    hadal("box", "run", "work", "--", "printf", "%s", "\x1b[31m", stdin=b"")
    lines = hadal.text("box", "log", "work").splitlines()
    assert lines[0].split()[0] == "1"
    assert "\x1b" not in "".join(lines)
    assert "exit 0" in lines[-1]
    assert "\\x1b[31m" in lines[-1]
    records = [json.loads(line) for line in hadal.text("box", "log", "work", "--json").splitlines()]
    assert [r["position"] for r in records] == list(range(1, len(records) + 1))
    assert {r["kind"] for r in records} <= {"command", "write", "change", "fork"}


@pytest.mark.slow
def test_follow(hadal):
    box = hadal.text("box", "create").strip()
    following = hadal.start("box", "log", box, "--follow", stdout=subprocess.PIPE)
    hadal("box", "run", box, "-c", "sleep 0.6; exit 4", code=4)
    hadal("box", "rm", box)
    lines = following.communicate(timeout=20)[0].decode().splitlines()
    assert [line.split()[2] for line in lines] in (["BEGUN", "exit"], ["exit"])
    assert "exit 4" in lines[-1]


@pytest.mark.slow
def test_fork(hadal, box):
    hadal("box", "run", "work", "-c", "echo kept > /kept")
    children = hadal.text("box", "fork", "work", "-n", "2").split()
    assert len(children) == 2
    for child in children:
        assert hadal.text("box", "run", child, "--", "cat", "/kept") == "kept\n"
    assert hadal.text("box", "rm", *children).split() == children


@pytest.mark.slow
def test_snapshot(hadal, box):
    hadal("box", "run", "work", "-c", "echo kept > /snapped")
    reference = hadal.text("box", "snapshot", "work", "--name", "saved").strip()
    child = hadal.text("box", "create", reference, "--network", "deny").strip()
    assert hadal.text("box", "run", child, "--", "cat", "/snapped") == "kept\n"
    hadal("box", "rm", child)


def test_list(hadal, box):
    table = hadal.text("box", "ls")
    assert box in table
    assert "work" in table
    assert "running" in table


def test_a_node_that_ignores_interrupts_has_boxes_that_do_not(tmp_path):
    """As one started in the background of a script does."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from hadal.sandbox import ContainerSpec, Sandbox\n"
        "with Sandbox.create(ContainerSpec(memory_mb=64)) as box:\n"
        "    print(box.run('kill -INT $$; echo lives').exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={**os.environ, "HADAL_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "130\n", done.stderr

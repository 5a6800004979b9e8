"""What agents did in the systems that were reported on (forged frames, replaced shells, greps), one test each."""

import errno
import socket
from pathlib import Path

import pytest

from hadal.errors import CommandRefusedError, ConfigError, SandboxFileError
from tests.sandbox.conftest import needs_root

pytestmark = needs_root


def test_no_way_leads_to_the_guest_or_the_node(make, node, attack):
    """Forged requests need a socket to send them to: none is on any path, in any name space, or open."""
    box = make()
    assert box.run("find / -xdev -type s 2>/dev/null").stdout == ""
    for path in (
        node / "b" / box.id / "guest",
        node / "node.sock",
        node / "journal.db",
        node / "node.log",
    ):
        assert path.exists()
        assert not box.files.exists(str(path)), path
    found = attack(box, "guest_doors", str(node / "b" / box.id / "guest"), str(node / "node.sock"))
    assert len(found) > 30
    assert "OK" not in found.values(), found
    assert box.run("echo on").stdout == "on\n"


def test_the_log_is_nowhere_in_the_box(box):
    secret = "answer-4711"
    box.run(["true", secret])
    box.run("true", stdin=secret)
    found = box.run("grep -rl answer-47'1'1 /etc /tmp /var /run /dev/shm /root /proc/1 2>/dev/null")
    assert found.stdout == ""


def test_every_tool_of_the_image_may_be_overwritten(make):
    """Nothing of ours runs a program of the image."""
    box = make()
    box.files.write("/tmp/before", "kept")
    # /usr is the host's and cannot be written; what leads to it can.
    assert box.run("echo x > /usr/bin/true").exit_code != 0
    result = box.run(
        "mkdir /new && printf '#!/nowhere\\n' > /new/sh && chmod 755 /new/sh && rm /bin && mv /new /bin"
        " && rm -f /sbin /lib /lib64"
    )
    assert result.exit_code == 0, result
    assert box.files.read("/tmp/before") == b"kept"
    box.files.write("/tmp/after", "written")
    assert {f.path for f in box.files.list("/tmp")} == {"before", "after"}
    box.files.remove("/tmp/before")
    with pytest.raises(CommandRefusedError):
        box.run("echo hello", timeout_s=10)
    box.files.remove("/bin", recursive=True)
    box.files.symlink("/bin", "usr/bin")
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            box.files.symlink(f"/{name}", f"usr/{name}")
    assert box.run("echo hello").stdout == "hello\n"


@pytest.mark.slow
def test_a_recursive_grep_over_proc_and_sys_ends(box, neighbour):
    with neighbour():
        result = box.run(
            "grep -r -s -I -m1 hadal-needle /proc /sys /dev > /tmp/found; echo done", timeout_s=120
        )
    assert result.stdout == "done\n", result
    assert box.run("echo on").stdout == "on\n"


def test_a_crash_loop_harms_nobody(box, attack):
    """An exploit that misses, again and again: segmentation faults, and no core anywhere."""
    result = box.run(
        "i=0; while [ $i -lt 300 ]; do sh -c 'kill -SEGV $$'; i=$((i+1)); done; echo done",
        timeout_s=30,
    )
    assert result.stdout == "done\n"
    assert (
        box.run("find / -xdev -name 'core*' -type f -newer /etc/hostname 2>/dev/null").stdout == ""
    )
    assert box.run("ls /proc | grep -c '^[0-9]'").stdout.strip() in ("3", "4", "5")


def test_stopped_operations_on_files_fail_instead_of_hanging(box):
    """Root in a box may stop every process, ours too: whoever waits for one must not wait for ever."""
    box.run("mkfifo /tmp/p")
    box.spawn("while :; do kill -STOP -1; done", timeout_s=5)
    with pytest.raises(SandboxFileError):
        box.files.read("/tmp/p")


def test_a_user_with_a_zero_byte_is_not_root(box):
    with pytest.raises(ConfigError, match="zero byte"):
        box.run("id -u", user="nobody\0")


def test_too_many_arguments_are_refused_and_the_box_lives(box):
    for request in (
        {"command": ["true", *["x" * 1000] * 1000]},
        {"command": "true", "env": {"A": "x" * 600_000}},
    ):
        with pytest.raises(CommandRefusedError) as refused:
            box.run(**request)
        assert refused.value.errno == errno.E2BIG
    assert box.run("echo on").stdout == "on\n"


def test_a_port_of_the_host_is_out_of_reach(box):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "refused" in box.run(["python3", "-c", script]).stderr

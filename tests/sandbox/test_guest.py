"""The guest program through its protocol: commands, streams, times, users, files."""

import ast
import asyncio
import hashlib
import io
import os
import re
import shutil
import signal
import struct
import tarfile
from pathlib import Path

import pytest

from hadal.errors import CommandRefusedError, LaunchError
from hadal.node import wire
from hadal.node.guest import Guest
from hadal.node.scratch import Disks
from hadal.node.wire import Frame, Tag, TimedOut
from tests.sandbox.conftest import Output, needs_root

ROOT = Path(__file__).parents[2]
pytestmark = needs_root


def test_numbers_are_those_of_the_c_header():
    header = (ROOT / "guest/protocol.h").read_text(encoding="utf-8")
    defined = dict(re.findall(r"^ +([FT]_[A-Z_]+) = (\d+)", header, re.MULTILINE))
    for name, value in defined.items():
        kind = Frame if name.startswith("F_") else Tag
        assert kind[name[2:]] == int(value), name
    assert len(defined) == len(Frame) + len(Tag)
    constants = dict(re.findall(r"#define (WINDOW|TAIL|PROTOCOL_VERSION) \(?([0-9 *]+)", header))
    assert {k: eval(v) for k, v in constants.items()} == {k: getattr(wire, k) for k in constants}


def test_commands_streams_and_status(with_box):
    async def body(box):
        ended, out, err = await box.shell("echo out; echo err >&2; exit 7")
        assert (ended.status, out, err) == (7 << 8, b"out\n", b"err\n")
        ended, out, _ = await box.shell("kill -TERM $$")
        assert ended.status == signal.SIGTERM
        assert (await box.run("echo", "a b", ""))[1] == b"a b \n"
        ended, out, _ = await box.shell(
            "echo $A; pwd; id -un; umask", environment={"A": "b c"}, directory=b"/tmp", user="ada"
        )
        assert out == b"b c\n/tmp\nada\n0022\n"
        assert (await box.shell("id -G", user="ada"))[1] == b"1000 50\n"
        assert (await box.shell("id -u; id -g", user="12:34"))[1] == b"12\n34\n"

    with_box(body)


def test_a_program_with_capabilities_it_cannot_have_runs(with_box, rootfs):
    """As Debian's ping, which has CAP_NET_RAW in its file, and needs it on old kernels only."""
    program = rootfs / "usr-local/ping"
    program.parent.mkdir()
    shutil.copy(shutil.which("true"), program)
    net_raw, effective, version = 13, 1, 2 << 24
    value = struct.pack("<5I", version | effective, 1 << net_raw, 0, 0, 0)
    os.setxattr(program, "security.capability", value)

    async def body(box):
        for user in ("root", "ada"):
            ended, _, err = await box.run("/usr-local/ping", user=user)
            assert ended.status == 0, (user, err)

    with_box(body)


def test_dev_belongs_to_root(with_box):
    """What root shares with others can be opened with O_CREAT: fs.protected_regular looks at the owner."""

    async def body(box):
        _, out, _ = await box.shell("cd /dev; stat -c '%u:%g %n' . * | grep -v ^0:0")
        assert out == b""
        await box.shell("touch /dev/shm/shared; chmod 666 /dev/shm/shared")
        code = "import os; os.open('/dev/shm/shared', os.O_RDWR | os.O_CREAT)"
        ended, _, err = await box.run("/usr/bin/python3", "-c", code, user="ada")
        assert ended.status == 0, err

    with_box(body)


def test_files_of_all_layers_are_on_one_device(with_box):
    """`du -x` leaves out the files that are on another device than where it begins."""

    async def body(box):
        await box.shell("mkdir /srv; touch /srv/new")
        _, out, _ = await box.shell("stat -c %d / /etc /etc/passwd /srv /srv/new | sort -u")
        assert len(out.split()) == 1, out
        code = "import os; print([e.name for e in os.scandir('/') if e.inode() != e.stat(follow_symlinks=False).st_ino])"
        _, out, err = await box.run("/usr/bin/python3", "-c", code)
        mounts = {"dev", "proc", "sys", "usr"}
        assert set(ast.literal_eval(out.decode())) <= mounts, err

    with_box(body, scratch=None, scratch_bytes=1 << 20, scratch_inodes=1000)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ({"arguments": ("nosuch",)}, "nosuch: No such file"),
        ({"arguments": ("/etc/passwd",)}, "Permission denied"),
        ({"arguments": ("true",), "user": "eve"}, "no such user"),
        ({"arguments": ("true",), "user": "ada:wheel"}, "no such group"),
        ({"arguments": ("true",), "directory": b"/none"}, "/none: No such file"),
    ],
)
def test_what_cannot_start_is_refused(with_box, order, text):
    arguments = order.pop("arguments")

    async def body(box):
        command, _ = box.start(*arguments, **order)
        with pytest.raises(CommandRefusedError, match=text):
            await command.ended
        assert (await box.shell("echo on"))[1] == b"on\n"

    with_box(body)


def test_a_number_is_never_run_twice(with_box):
    async def body(box):
        await box.shell("echo x >> /tmp/once")
        box.next = 0
        command, _ = box.start("sh", "-c", "echo x >> /tmp/once")
        with pytest.raises(CommandRefusedError, match="has been here before"):
            await command.ended
        box.next = 1
        assert (await box.shell("cat /tmp/once"))[1] == b"x\n"

    with_box(body)


def test_times_end_the_session_and_keep_what_was_written(with_box):
    async def body(box):
        loop = asyncio.get_running_loop()
        start = loop.time()
        ended, out, _ = await box.shell(
            "echo early; (sleep 50; echo late) & sleep 60", timeout_ms=300
        )
        assert loop.time() - start < 1.3
        assert (ended.status, ended.timed_out, out) == (9, TimedOut.LIFE, b"early\n")
        ended, out, _ = await box.shell("echo a; sleep 0.1; echo b; sleep 60", quiet_ms=400)
        assert (ended.timed_out, out) == (TimedOut.QUIET, b"a\nb\n")
        assert b"sleep" not in (await box.shell("cat /proc/[0-9]*/comm"))[1]

    with_box(body)


def test_background_processes_do_not_hold_a_command(with_box):
    async def body(box):
        start = asyncio.get_running_loop().time()
        ended, out, _ = await box.shell("(sleep 30; echo late) & echo now")
        assert (ended.status, out) == (0, b"now\n")
        assert asyncio.get_running_loop().time() - start < 5
        # A server that logs to the command's output lives on.
        await box.shell("(while sleep 0.02; do echo tick || exit; echo t >> /tmp/t; done) & true")
        await asyncio.sleep(0.3)
        assert len((await box.shell("cat /tmp/t"))[1]) > 6

    with_box(body)


def test_output_limit_keeps_the_beginning_and_the_end(with_box):
    async def body(box):
        ended, out, _ = await box.shell("seq 1 200000", output_limit=1000)
        whole = "".join(f"{i}\n" for i in range(1, 200001)).encode()
        assert ended.stdout_bytes == len(whole)
        assert out == whole[:1000] + whole[-wire.TAIL :]

    with_box(body)


def test_unread_output_waits_for_acknowledgement_and_loses_nothing(with_box):
    async def body(box):
        command, output = box.start("sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; echo end")
        await asyncio.sleep(0.5)
        assert not command.ended.done()
        assert len(output.streams[1]) == wire.WINDOW
        while not command.ended.done():
            command.acknowledge(len(output.streams[1]), 0)
            await asyncio.sleep(0.005)
        assert bytes(output.streams[1]) == b"x" * 3000000 + b"end\n"
        assert not output.gaps

    with_box(body)


def test_a_new_connection_takes_over(with_box):
    async def body(box):
        long, before = box.start("sh", "-c", "echo one; sleep 0.6; echo two; exit 3")
        quick, _ = box.start("true")
        await quick.ended
        await long.started
        box.guest.close()
        box.guest = await Guest.connect(box.folder / "guest")
        assert await box.guest.list() == {long.id: False, quick.id: True}
        after = Output()
        command = box.guest.attach(long.id, after, len(before.streams[1]), 0)
        ended = await command.ended
        assert ended.status == 3 << 8
        assert before.streams[1] + after.streams[1] in (b"one\ntwo\n", b"one\none\ntwo\n")
        whole = Output()
        again = box.guest.attach(quick.id, whole, 0, 0)
        assert (await again.ended).status == 0
        again.forget()
        assert list(await box.guest.list()) == [long.id]

    with_box(body)


def test_nobody_listens_and_the_command_goes_on(with_box):
    async def body(box):
        command, _ = box.start("sh", "-c", "head -c 2000000 /dev/zero; echo done > /tmp/done")
        await command.started
        box.guest.close()
        await asyncio.sleep(5.5)  # it waits for a while for the next one
        box.guest = await Guest.connect(box.folder / "guest")
        output = Output()
        ended = await box.guest.attach(command.id, output, 0, 0).ended
        assert ended.stdout_bytes == 2000000
        assert output.gaps, "what nobody took is lost, and said to be"
        assert (await box.shell("cat /tmp/done"))[1] == b"done\n"

    with_box(body)


def test_input_of_any_size(with_box):
    async def body(box):
        data = bytes(range(256)) * 8000
        command, output = box.start("sha256sum", stdin=True)
        await command.write(data)
        command.end_input()
        await command.ended
        assert output.streams[1].split()[0].decode() == hashlib.sha256(data).hexdigest()
        command, _ = box.start("true", stdin=True)
        await command.write(data)  # nobody reads it; nobody hangs
        assert (await command.ended).status == 0

    with_box(body)


def test_terminal(with_box):
    async def body(box):
        command, output = box.start("sh", tty=(30, 100), environment={"PS1": "> ", "TERM": "dumb"})
        await command.write(b"tty; stty size\n")
        await asyncio.sleep(0.3)
        command.resize(40, 120)
        await command.write(b"stty size; sleep 50\n")
        await asyncio.sleep(0.3)
        await command.write(b"\x03")
        await command.write(b"exit 5\n")
        assert (await command.ended).status == 5 << 8
        text = bytes(output.streams[1])
        assert b"/dev/pts/0" in text
        assert b"30 100" in text
        assert b"40 120" in text

    with_box(body)


def test_a_thousand_at_once(with_box):
    async def body(box):
        commands = [box.start("sh", "-c", f"echo {i}; exit {i % 100}") for i in range(1000)]
        for i, (command, output) in enumerate(commands):
            assert (await command.ended).status == (i % 100) << 8
            assert output.streams[1] == f"{i}\n".encode()

    with_box(body)


def test_trees_as_tar(with_box):
    async def body(box):
        await box.shell(
            "mkdir -p /t/d/e; echo x > /t/d/f; ln -s f /t/d/l; chmod 640 /t/d/f;"
            "echo long > /t/$(printf 'n%.0s' $(seq 1 200)); mkfifo /t/p"
        )
        ended, packed, err = await box.run("pack", "/t", applet=True)
        assert ended.status == 0, err
        archive = tarfile.open(fileobj=io.BytesIO(packed))  # noqa: SIM115 — in memory
        names = {m.name: m for m in archive}
        assert names["./d/f"].mode == 0o640
        assert names["./d/l"].linkname == "f"
        assert "./" + "n" * 200 in names
        for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w", format=kind) as out:
                for member in archive:
                    archive.fileobj.seek(0)
                    content = archive.extractfile(member) if member.isreg() else None
                    out.addfile(member, content)
            await box.shell("rm -rf /u; mkdir /u")
            command, _ = box.start("unpack", "/u", applet=True, stdin=True)
            await command.write(made.getvalue())
            command.end_input()
            assert (await command.ended).status == 0
            same = await box.shell(
                "diff -r --no-dereference /t /u 2>&1 | grep -v fifo; stat -c %a /u/d/f"
            )
            assert same[1] == b"640\n"

    with_box(body)


@pytest.mark.parametrize("name", ["../out", "a/../../out", "link/out"])
def test_a_tar_stream_cannot_lead_outside(with_box, name):
    async def body(box):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as out:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc"
            out.addfile(link)
            entry = tarfile.TarInfo(name)
            entry.size = 3
            out.addfile(entry, io.BytesIO(b"bad"))
        await box.shell("mkdir -p /in/side")
        command, output = box.start("unpack", "/in/side", applet=True, stdin=True)
        await command.write(made.getvalue())
        command.end_input()
        assert (await command.ended).status == 1 << 8
        fields = wire.decode_fields(bytes(output.streams[2]))
        assert fields[Tag.TEXT].endswith(b"out")
        assert (await box.shell("ls /in /etc | grep out"))[1] == b""

    with_box(body)


def test_the_guest_is_out_of_reach(with_box):
    async def body(box):
        look = "cat /proc/1/environ /proc/1/maps; ls /proc/1/fd /proc/1/root /proc/1/cwd; readlink /proc/1/exe"
        _, out, _ = await box.shell(look)
        assert out == b""
        await box.shell("kill -9 1; kill -STOP 1; kill -TERM -1")
        assert (await box.shell("echo on"))[1] == b"on\n"
        named = await box.shell("cat /proc/net/unix /proc/mounts /proc/1/cmdline /proc/1/comm")
        assert b"guest" not in named[1]
        assert b"tmp" not in (await box.shell("cat /proc/1/cmdline"))[1]

    with_box(body)


def test_what_a_box_may_not_do(with_box):
    async def body(box):
        _, out, _ = await box.shell("grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status")
        assert out.split() == [
            b"CapEff:",
            b"00000000800405fb",
            b"NoNewPrivs:",
            b"1",
            b"Seccomp:",
            b"2",
        ]
        for text in (
            "mount -t tmpfs none /tmp",
            "unshare -U true",
            "unshare -n true",
            "mknod /tmp/d b 8 0",
            "echo x > /proc/sys/kernel/core_pattern",
            "echo c > /proc/sysrq-trigger",
            "hostname other",
            "umount /proc",
            "chroot / true && unshare -m true",
        ):
            ended, _, err = await box.shell(text)
            if text == "echo c > /proc/sysrq-trigger":
                continue  # it is /dev/null now
            assert ended.status, (text, err)

    with_box(body)


_ASKS_KVM = """
import fcntl, os
print(os.getuid(), fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE00, 0))
"""


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this host has no /dev/kvm")
def test_kvm_is_for_boxes_that_were_given_it(with_box, tmp_path):
    async def given(box):
        _, out, err = await box.run("/usr/bin/python3", "-c", _ASKS_KVM, user="1000")
        assert out == b"1000 12\n", err

    async def not_given(box):
        _, out, err = await box.run("/usr/bin/python3", "-c", _ASKS_KVM, user="1000")
        assert (out, b"No such file" in err) == (b"", True)
        asks = "import fcntl; fcntl.ioctl(0, 0xAE00, 0)"
        _, _, err = await box.run("/usr/bin/python3", "-c", asks)
        assert b"Inappropriate ioctl" in err

    with_box(not_given)
    shutil.rmtree(tmp_path / "box")
    with_box(given, devices=("kvm",))


def test_no_other_device_is_given(with_box):
    with pytest.raises(LaunchError, match="a device that boxes do not get"):
        with_box(None, devices=("sda",))


def test_files_are_bound_to_places_that_are_not_there_yet(with_box, tmp_path):
    (tmp_path / "one").write_text("first")
    (tmp_path / "two").write_text("second")
    binds = [
        (Path("/usr"), "/usr", True),
        (tmp_path / "one", "/deep/er/one", True),
        (tmp_path / "two", "/two", False),
    ]

    async def body(box):
        _, out, _ = await box.shell("cat /deep/er/one /two; stat -c %a /deep/er")
        assert out == b"firstsecond755\n"
        ended, _, err = await box.shell("echo x > /deep/er/one")
        assert ended.status
        assert b"Read-only" in err

    with_box(body, binds=tuple(binds))


@pytest.mark.parametrize("count", [1, 2])
def test_descriptors_are_for_commands_that_are_to_have_them(with_box, count):
    kept = [os.memfd_create("kept") for _ in range(count)]
    for number, file in enumerate(kept):
        os.write(file, b"kept %d\n" % number)
        os.lseek(file, 0, os.SEEK_SET)

    async def body(box):
        for number in range(count):
            _, out, _ = await box.shell(f"cat <&{4 + number}", kept=True)
            assert out == b"kept %d\n" % number
        _, out, _ = await box.shell("ls /proc/self/fd", kept=True)
        assert out == b"".join(b"%d\n" % n for n in range(4 + count))  # 3 is what ls reads
        _, out, _ = await box.shell("ls /proc/self/fd")
        assert out == b"0\n1\n2\n3\n"

    try:
        with_box(body, keep=tuple(kept), scratch=None, scratch_bytes=1 << 20, scratch_inodes=100)
    finally:
        for file in kept:
            os.close(file)


def test_a_disk_and_what_is_kept_come_together(with_box, tmp_path):
    file = os.memfd_create("kept")
    try:
        disk = Disks(tmp_path / "disks").make(8 << 20, 100)
        try:

            async def body(box):
                _, out, _ = await box.shell("df -k / | tail -1; ls -l /proc/self/fd/4", kept=True)
                assert 7000 < int(out.split()[1]) < 10000
                assert b"memfd:kept" in out

            with_box(body, keep=(file,), scratch=disk.descriptor)
        finally:
            os.close(disk.descriptor)
    finally:
        os.close(file)


def test_more_descriptors_than_are_named_are_refused(with_box):
    files = tuple(os.memfd_create("kept") for _ in range(3))
    try:
        with pytest.raises(LaunchError, match="other descriptors than it says"):
            with_box(None, keep=files)
    finally:
        for file in files:
            os.close(file)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layers": (Path("/nowhere"),)}, "mount: /nowhere: No such file"),
        (
            {"cgroups": (Path("/nowhere/cgroup.procs"),)},
            "cgroup: /nowhere/cgroup.procs: No such file",
        ),
        ({"network": Path("/nowhere")}, "network: /nowhere: No such file"),
        ({"socket": Path("/tmp", "x" * 108)}, "socket: .*name too long"),
        ({"limits": ("nonsense=1:1",)}, "limits: nonsense=1:1: Invalid argument"),
    ],
)
def test_a_bad_request_says_which_step(with_box, change, text):
    async def body(box):
        raise AssertionError

    with pytest.raises(LaunchError, match=text):
        with_box(body, **change)

"""One test for each way out of a container: what root in a box tries, and what comes of it."""

import ast
import contextlib
import ctypes
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from hadal.errors import CommandRefusedError, SandboxFileError
from tests.sandbox.conftest import needs_root

pytestmark = needs_root
REFUSED = {"EPERM", "EACCES", "ENOSYS", "ENOTTY", "EAFNOSUPPORT"}
"""Of the permission itself. EINVAL or ENOENT would only say that the attempt was a poor one."""


def test_every_refused_call_is_refused(box, attack):
    found = attack(box, "refusals")
    assert len(found) > 120, "the program stopped early"
    assert {k: v for k, v in found.items() if v not in REFUSED} == {}
    assert found["clone3"] == found["32-bit call"] == found["x32 call"] == "ENOSYS"


def test_another_user_is_refused_as_much(box, attack):
    found = attack(box, "refusals", user="1234:1234")
    odd = {k: v for k, v in found.items() if v not in REFUSED}
    # /tmp/opaque belongs to root, and a file that cannot be opened has no ioctl.
    assert set(odd.values()) <= {"EBADF"}, odd


def test_root_has_no_privilege_that_matters(box):
    status = box.run("cat /proc/self/status").stdout
    effective = int(re.search(r"CapEff:\s+(\w+)", status)[1], 16)
    kept = {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31}
    assert {n for n in range(64) if effective >> n & 1} == kept
    for name in ("CapPrm", "CapBnd"):
        assert int(re.search(rf"{name}:\s+(\w+)", status)[1], 16) == effective
    assert re.search(r"NoNewPrivs:\s+1", status)
    assert re.search(r"Seccomp:\s+2", status)


def test_no_mount_honours_setuid(box):
    mounts = [line.split() for line in box.run("cat /proc/self/mounts").stdout.splitlines()]
    assert [m[1] for m in mounts if "nosuid" not in m[3].split(",")] == []


def test_no_descriptor_of_the_host_is_open(make):
    """CVE-2024-21626: an open directory of the host was the working directory of the next command."""
    box = make()
    listed = box.run(["ls", "-l", "/proc/self/fd"]).stdout
    paths = re.findall(r"(\d+) -> (\S+)", listed)
    assert [n for n, _ in paths] == ["0", "1", "2", "3"], listed  # 3 is the directory that ls reads
    assert all(p == "/dev/null" or p.startswith(("pipe:", "/proc/")) for _, p in paths), listed
    for number in range(3, 20):
        with pytest.raises(SandboxFileError):
            box.files.list(f"/proc/self/fd/{number}/../../..")


def test_no_working_directory_leads_out(make):
    box = make()
    for directory in (
        "/proc/self/fd/3",
        "/proc/self/fd/8",
        "/proc/1/cwd",
        "/proc/1/root",
        "/proc/1/fd/3",
    ):
        with contextlib.suppress(CommandRefusedError):
            result = box.run("ls ../../../../; pwd -P", cwd=directory)
            assert "guest" not in result.stdout.split(), result
    here = {p.name for p in Path("/").iterdir()} - {
        "usr",
        "bin",
        "sbin",
        "lib",
        "lib64",
        "lib32",
        "libx32",
    }
    marks = here - set(box.run("ls /").stdout.split())
    assert marks, "the root of the host cannot be told from the box's"


def test_the_init_cannot_be_looked_into(box):
    """CVE-2019-5736: /proc/1/exe led to the program of the host, which could be written."""
    for name in (
        "mem",
        "environ",
        "root",
        "cwd",
        "exe",
        "maps",
        "auxv",
        "stack",
        "syscall",
        "fd/3",
    ):
        result = box.run(f"cat /proc/1/{name} || ls /proc/1/{name}/ || readlink /proc/1/{name}")
        assert result.exit_code != 0, name
        assert result.stdout == "", name
    assert box.run("ls /proc/1/fd /proc/1/map_files").stdout.replace("/proc/1/fd:", "").strip() in (
        "",
        "/proc/1/map_files:",
    )
    assert box.run("tr '\\0' ' ' < /proc/1/cmdline").stdout.strip() == "init"
    assert box.run("exec 3>> /proc/1/exe").exit_code != 0
    assert box.run("kill -9 1; kill -STOP 1; kill -SEGV 1; echo alive").stdout == "alive\n"
    assert box.run("echo still").stdout == "still\n"


def test_nothing_of_the_kernel_can_be_written(box):
    """core_pattern, sysrq, uevent_helper, modprobe, binfmt_misc, and whatever else is there."""
    script = r"""
    find /proc /sys -xdev -type f -not -path '/proc/[0-9]*' -not -path '/proc/self/*' \
        -not -path '/proc/thread-self/*' -writable 2>/dev/null | while read -r f; do
        if ( : >> "$f" ) 2>/dev/null; then echo "$f"; fi
    done
    for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /sys/kernel/uevent_helper \
        /proc/sys/kernel/modprobe /proc/sys/vm/drop_caches /proc/sys/fs/binfmt_misc/register; do
        if echo x 2>/dev/null > "$f"; then echo "written: $f"; fi
    done
    """
    result = box.run(script, timeout_s=60)
    written = [f for f in result.stdout.split("\n") if f and not f.startswith("/proc/pressure")]
    # What is covered by /dev/null can be opened, and leads nowhere.
    masked = {"written: /proc/sysrq-trigger"} | {
        f for f in written if box.run(["stat", "-c", "%t:%T", f]).stdout == "1:3\n"
    }
    assert set(written) <= masked
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    assert box.run("echo '|/tmp/x' > /proc/sys/kernel/core_pattern").exit_code != 0
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_no_control_group_is_in_reach(box):
    """release_agent needs a cgroup mount: there is none, and none can be made."""
    mounts = box.run("cat /proc/self/mountinfo").stdout
    assert "cgroup" not in mounts
    assert box.run("find / -xdev -name release_agent -o -xdev -name cgroup.procs").stdout == ""
    assert set(
        re.findall(r"^\d+:[^:]*:(.*)$", box.run("cat /proc/self/cgroup").stdout, re.MULTILINE)
    ) <= {"/"}


def test_nothing_of_the_host_is_seen(make):
    box, other = make(), make()
    mounts = box.run("cat /proc/self/mounts /proc/self/mountinfo").stdout
    assert other.id not in mounts
    assert "guest" not in box.run("cat /proc/net/unix").stdout
    name = f"hadal-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        assert name not in box.run("cat /proc/net/unix").stdout
    other.run("sleep 60 > /dev/null 2>&1 &")
    assert "sleep" not in box.run("cat /proc/[0-9]*/comm").stdout
    assert box.run("hostname").stdout.strip() == box.id != socket.gethostname()


@contextlib.contextmanager
def host_objects(key, name):
    """Objects of every kind of IPC on the host, which anybody may use."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.semctl.argtypes = [ctypes.c_int] * 3
    librt = ctypes.CDLL("librt.so.1", use_errno=True)
    made = {
        "shm": libc.shmget(key, 4096, 0o1666),
        "msg": libc.msgget(key, 0o1666),
        "sem": libc.semget(key, 1, 0o1666),
    }
    queue = librt.mq_open(f"/{name}".encode(), os.O_RDWR | os.O_CREAT, 0o666, None)
    shared = Path("/dev/shm", name)
    shared.write_text("secret")
    try:
        assert min(*made.values(), queue) >= 0, (made, queue, os.strerror(ctypes.get_errno()))
        yield made
    finally:
        shared.unlink()
        librt.mq_unlink(f"/{name}".encode())
        libc.shmctl(made["shm"], 0, None)
        libc.msgctl(made["msg"], 0, None)
        libc.semctl(made["sem"], 0, 0)


# Prints a number for each kind of object that it finds, by its key, its number or its name.
FIND_OBJECTS = """
import ctypes, os, sys
libc, librt = ctypes.CDLL(None), ctypes.CDLL("librt.so.1")
libc.shmat.restype = ctypes.c_void_p
key, name = int(sys.argv[1]), "/" + sys.argv[2]
shm, msg, sem = map(int, sys.argv[3:6])
buffer = ctypes.create_string_buffer(4096)
found = {
    "shm by key": libc.shmget(key, 0, 0), "msg by key": libc.msgget(key, 0), "sem by key": libc.semget(key, 0, 0),
    "shm by number": libc.shmctl(shm, 2, buffer), "msg by number": libc.msgctl(msg, 2, buffer),
    "sem by number": libc.semctl(sem, 0, 12, 0), "mq": librt.mq_open(name.encode(), os.O_RDONLY),
    "shm_open": librt.shm_open(name.encode(), os.O_RDONLY, 0),
}
print({kind: number for kind, number in found.items() if number >= 0})
for kind in ("shm", "msg", "sem"):
    print(len(open(f"/proc/sysvipc/{kind}").readlines()) - 1)
print(*(os.listdir(p) for p in ("/dev/shm", "/dev/mqueue") if os.path.exists(p)))
"""


def test_no_ipc_object_of_the_host_or_a_neighbour_is_seen(make):
    box, other = make(), make()
    key, name = 0x4AD0000 | os.getpid() & 0xFFFF, f"hadal-test-{os.getpid()}"
    with host_objects(key, name) as made:
        arguments = [str(key), name, *map(str, made.values())]
        there = subprocess.run(
            ["python3", "-c", FIND_OBJECTS, *arguments], capture_output=True, text=True, check=True
        )
        assert len(ast.literal_eval(there.stdout.splitlines()[0])) == 8, (
            there
        )  # or it finds nothing
        assert "0" not in there.stdout.splitlines()[1:4]
        other.run(["python3", "-c", MAKE_OBJECTS, str(key), name], check=True)
        assert "'mq': " in other.run(["python3", "-c", FIND_OBJECTS, *arguments]).stdout
        found = box.run(["python3", "-c", FIND_OBJECTS, *arguments])
    assert found.stdout == "{}\n0\n0\n0\n[] []\n", found


MAKE_OBJECTS = """
import ctypes, os, sys
libc, librt = ctypes.CDLL(None), ctypes.CDLL("librt.so.1")
key, name = int(sys.argv[1]), "/" + sys.argv[2]
made = libc.shmget(key, 4096, 0o1666), libc.msgget(key, 0o1666), libc.semget(key, 1, 0o1666)
queue = librt.mq_open(name.encode(), os.O_RDWR | os.O_CREAT, 0o666, None)
open("/dev/shm" + name, "w").write("secret")
assert min(*made, queue) >= 0
"""


def test_ids_are_not_those_of_the_host(box, node):
    """Root in a box is nobody on the host, and its files lie where only the host's root comes."""
    process = box.spawn("exec sleep 30")
    pids = Path("/proc").glob("[0-9]*/status")
    uids = [
        int(re.search(r"^Uid:\s+(\d+)", text, re.MULTILINE)[1])
        for text in (p.read_text() for p in pids if (p.parent / "comm").exists())
        if re.search(r"^NSpid:\t\d+\t\d+$", text, re.MULTILINE) and "Name:\tsleep" in text
    ]
    process.kill()
    assert uids
    assert min(uids) >= 1 << 20
    assert node.stat().st_mode & 0o077 == 0
    assert (node / "b").stat().st_mode & 0o077 == 0
    box.run("cp /usr/bin/id /tmp/suid; chmod 4755 /tmp/suid")
    found = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "find", str(node), "-perm", "-4000"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_setuid_and_file_capabilities_gain_nothing(box):
    box.run("cp /usr/bin/id /tmp/suid && chmod 4755 /tmp/suid")
    assert box.run(["/tmp/suid", "-u"], user="1234:1234").stdout == "1234\n"
    set_capability = (
        "import os, struct;"
        "os.setxattr('/tmp/python', 'security.capability', struct.pack('<5I', 0x2000001, 1 << 21, 0, 0, 0))"
    )
    box.run("cp -L /usr/bin/python3 /tmp/python; chmod 755 /tmp/python")
    box.run(["python3", "-c", set_capability])
    result = box.run("grep CapEff /proc/self/status", user="1234:1234")
    assert int(result.stdout.split()[1], 16) == 0
    result = box.run("/tmp/python -c 'print(open(\"/proc/self/status\").read())'", user="1234:1234")
    # The kernel does not even start what asks for a capability beyond the bounding set.
    assert result.exit_code == 126 or re.search(r"CapEff:\s+0+$", result.stdout, re.MULTILINE), (
        result
    )


def test_limits_of_users_are_counted_for_each_box(make, attack):
    """What a box uses up of the kernel's limits for a user is not missing for its neighbours or the host."""
    box, other = make(memory_mb=512), make(memory_mb=512)
    holding = box.spawn("sleep 60")
    found = attack(box, "exhaustion", "hold")
    assert found["inotify"] != "0"
    assert int(attack(other, "exhaustion", "ask")["inotify"]) > 0
    script = "import ctypes; assert ctypes.CDLL(None).inotify_init() >= 0"
    subprocess.run(["python3", "-c", script], check=True)
    assert Path("/proc/sys/fs/aio-nr").read_text().strip() == "0" or "io_setup" not in found
    holding.kill()

"""Virtual machines: what makes them different from other boxes."""

import asyncio
import errno
import hashlib
import json
import time

import pytest

from hadal.cli.main import app
from hadal.errors import (
    ConfigError,
    GoneCause,
    ImageError,
    SandboxFileError,
    SandboxGoneError,
    UnsupportedError,
)
from hadal.sandbox import ContainerSpec, MicroVMSpec, NetworkPolicy, Sandbox, VMSpec
from hadal.sandbox.nodes import AsyncNode
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines
from tests.sandbox.network_lab import needs_network

pytestmark = needs_root


@pytest.fixture(scope="module")
def image(node, tmp_path_factory):
    needs_machines()
    return import_image(node / "node" / "images", tmp_path_factory.mktemp("image"))


def test_machines_of_one_template_are_not_one_another(node, image):
    """What must differ differs, and the rest is the same: the second and the third are copies."""
    text = "cat /etc/machine-id; hostname; head -c 16 /dev/urandom | sha256sum; date +%s"
    found = []
    for _ in range(3):
        with Sandbox.create(MicroVMSpec(image=image)) as box:
            found.append([*box.run(text).stdout.splitlines(), box.run("uname -r; ls /").stdout])
            assert abs(time.time() - int(found[-1][3])) < 3
            assert found[-1][1] == box.id
    for column in range(3):
        assert len({row[column] for row in found}) == 3
    assert len({row[4] for row in found}) == 1


def test_what_one_machine_writes_no_other_has(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as first:
        first.run(
            "echo mine > /home/f; head -c 30000000 /dev/zero | tail -c 1 > /dev/null; sync",
            check=True,
        )
        with Sandbox.create(MicroVMSpec(image=image)) as second:
            assert second.run("ls -A /home/f").exit_code != 0
        assert first.files.read("/home/f") == b"mine\n"


_COUNTER = """
import itertools, os, time
def put(name, text):
    with open(name + ".part", "w") as file:
        file.write(text)
    os.rename(name + ".part", name)
for n in itertools.count():
    put("/run/count", f"{n} {os.getpid()} {os.urandom(8).hex()}")
    time.sleep(0.02)
"""


def test_what_runs_goes_on_in_a_fork_and_sees_nothing_of_the_other(node, image):
    """Processes, files and memory are those of one moment; what must be one's own is."""
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        box.files.write("/home/counter.py", _COUNTER)
        box.run("echo one > /home/f; nohup python3 /home/counter.py > /dev/null 2>&1 &", check=True)
        box.run("while [ ! -e /run/count ]; do sleep 0.05; done", timeout_s=60, check=True)
        waiting = box.spawn("sleep 3; echo waited")
        first, second = box.fork(2)
        with first, second:
            counts = [b.run("cat /run/count").stdout.split() for b in (box, first, second)]
            assert len({pid for _, pid, _ in counts}) == 1
            text = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; head -c 16 /dev/urandom | sha256sum"
            rows = [b.run(text).stdout.splitlines() for b in (box, first, second)]
            for column in zip(*rows, strict=True):
                assert len(set(column)) == 3
            seen = set()
            for member in (box, first, second):
                assert member.run("cat /home/f").stdout == "one\n"
                assert abs(int(member.run("date +%s").stdout) - time.time()) < 3
                later = member.run("cat /run/count").stdout.split()
                assert int(later[0]) > 3
                seen.add(later[2])
            assert len(seen) == 3
            first.run("echo two >> /home/f; kill $(cut -d ' ' -f 2 /run/count)", check=True)
            assert (
                second.run("cat /home/f; kill -0 $(cut -d ' ' -f 2 /run/count)").stdout == "one\n"
            )
            (third,) = first.fork(1)
            with third:
                assert third.run("cat /home/f").stdout == "one\ntwo\n"
                assert box.run("cat /home/f").stdout == "one\n"
        assert waiting.wait().stdout == "waited\n"
    assert not any((node / "node/machines/copies").iterdir())


def test_a_command_of_the_other_runs_on_in_a_fork_and_does_not_wait_for_a_reader(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        running = box.spawn(
            "head -c 3000000 /dev/zero; sleep 1; head -c 3000000 /dev/zero; touch /home/done"
        )
        (fork,) = box.fork(1)
        with fork:
            until = "while [ ! -e /home/done ]; do sleep 0.1; done"
            fork.run(until, timeout_s=30, check=True)
            result = running.wait()
            assert result.exit_code == 0
            box.run("test -e /home/done", check=True)


@pytest.mark.parametrize("kind", [MicroVMSpec, VMSpec])
def test_a_session_of_a_container_is_done_again_in_a_machine(node, image, kind):
    """Exit codes, outputs and files are the same; what has to differ is named, and nothing else."""
    with (
        Sandbox.create(ContainerSpec(image=image)) as recorded,
        Sandbox.create(kind(image=image)) as machine,
    ):
        recorded.run("mkdir -p /home/w; cd /home/w; seq 1 2000 > n; sort -r n | head -3; wc -l < n")
        recorded.files.write("/home/w/prog.py", "import sys\nprint(sum(map(int, sys.stdin)))\n")
        recorded.run("python3 /home/w/prog.py < /home/w/n; cd /home/w; cp n m; rm n")
        recorded.run("ls -la /home/w | cut -c 1-10; cat /nowhere; exit 7")
        recorded.run("ln -s prog.py /home/w/link; ln /home/w/prog.py /home/w/hard; rm /usr/bin/yes")
        recorded.files.rename("/home/w/link", "/home/w/other")
        recorded.run("python3 -c 'import os; os.kill(os.getpid(), 9)'")
        report = machine.replay(recorded.id)
        assert report.differences == ()
        assert report.same
        assert (report.steps, report.skipped) == (7, ())
        assert report.compared_files >= 6
        recorded.run("cat /proc/sys/kernel/osrelease > /home/w/kernel; cat /home/w/kernel")
        with Sandbox.create(kind(image=image)) as again:
            report = again.replay(recorded.id)
        found = {(d.position, d.what, d.subject) for d in report.differences}
        shown = "cat /proc/sys/kernel/osrelease > /home/w/kernel; cat /home/w/kernel"
        assert found == {(8, "stdout", shown), (0, "file", "/home/w/kernel")}


def test_kept_machines_are_listed_and_removed(node, image, capsys):
    def snapshots(*arguments):
        app(["node", "snapshots", "--json", *arguments], result_action="return_value")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    with Sandbox.create(MicroVMSpec(image=image)) as box:
        assert box.snapshot("ready", kind="full") == "machine@ready"
        (found,) = [kept for kept in snapshots() if kept["reference"] == "machine@ready"]
        assert found["spec"]["image"] == image
        assert found["size"] > 20_000_000
        with pytest.raises(ConfigError, match="memory_mb: machine@ready has 256, got 512"):
            Sandbox.create(MicroVMSpec(from_="machine@ready", memory_mb=512))
        with pytest.raises(ConfigError, match="cannot go on as a container"):
            Sandbox.create(ContainerSpec(from_="machine@ready"))
    snapshots("--remove", "machine@ready")
    assert "machine@ready" not in [kept["reference"] for kept in snapshots()]
    with pytest.raises(ImageError, match="no machine was kept as machine@ready"):
        Sandbox.create(MicroVMSpec(from_="machine@ready"))


_TRY = """
import socket, sys
for host in sys.argv[1:]:
    try:
        socket.create_connection((host, 80), timeout=5)
        print("connected")
    except OSError as error:
        print(type(error).__name__)
"""


@needs_network
def test_a_machine_has_a_network_of_its_own_and_so_has_each_copy(node, image):
    """Root in it does as it likes with its card; who it is, and what it may reach, is decided outside."""
    policy = NetworkPolicy(allow=("web.test:443",))
    with Sandbox.create(MicroVMSpec(image=image, network=policy)) as box:
        box.files.write("/try.py", _TRY)
        tried = box.run("python3 /try.py 192.0.2.1 other.test 169.254.169.254").stdout.split()
        assert tried == ["ConnectionRefusedError", "gaierror", "ConnectionRefusedError"]
        found = box.network()
        assert {d["target"] for d in found["denials"]} >= {"192.0.2.1:80/tcp", "other.test"}
        assert found["questions_refused"] > 0
        address = (
            "ip -4 -o addr show eth0 | tr -s ' ' | cut -d ' ' -f 4; cat /sys/class/net/eth0/address"
        )
        own = box.run(address).stdout.split()
        (fork,) = box.fork(1)
        with fork:
            other = fork.run(address).stdout.split()
            assert len({*own, *other}) == 4
            assert fork.run("python3 /try.py 192.0.2.2").stdout == "ConnectionRefusedError\n"
            assert {d["target"] for d in fork.network()["denials"]} == {"192.0.2.2:80/tcp"}
            # With the address of the other it is nobody: nothing is answered, and nothing is counted.
            sent = box.network()["rejected"]["packets"]
            fork.run(f"ip addr add {own[0]} dev eth0; ip addr del {other[0]} dev eth0", check=True)
            fork.run(
                "ip route add 10.201.0.1 dev eth0; ip route replace default via 10.201.0.1 dev eth0"
            )
            assert fork.run("python3 /try.py 192.0.2.3").stdout != "connected\n"
            assert box.network()["rejected"]["packets"] == sent
        box.set_network(NetworkPolicy(default="deny"))
        assert box.run("python3 /try.py web.test").stdout == "gaierror\n"


def test_a_machine_without_a_network_has_loopback_alone(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        assert box.run("ls /sys/class/net").stdout.split() == ["lo"]
        with pytest.raises(UnsupportedError, match="without a network"):
            box.set_network(NetworkPolicy(default="deny"))


def test_a_kernel_that_panics_is_told(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        with pytest.raises(SandboxGoneError) as caught:
            box.run("echo c > /proc/sysrq-trigger; sleep 60")
        assert caught.value.cause == GoneCause.CRASHED


_ODD = """
import os
os.chdir("/home")
with open("sparse", "wb") as file:
    file.truncate(5_000_000)
    os.pwrite(file.fileno(), b"end", 4_999_990)
open("a" * 200, "w").write("long")
os.link("a" * 200, "linked")
os.symlink("b" * 300, "link")
os.mkfifo("fifo", 0o640)
os.chown("fifo", 12, 34)
os.setxattr("linked", "user.colour", b"blue\\x00\\n")
os.utime("linked", ns=(1, 1234567890123456789))
os.mkdir("d" * 120)
open("d" * 120 + "/" + "e" * 120, "w").write("x" * 1000)
"""


def test_a_snapshot_of_a_machine_has_all_that_it_has_changed(node, image):
    """Long names, hard links, attributes, times to the nanosecond, what is gone and what was replaced."""
    look = (
        "cd /home; stat -c '%n %F %a %u %g %h %Y' * | sort; sha256sum a* sparse d*/*; stat -c %y linked;"
        'python3 -c \'import os; print(os.getxattr("linked", "user.colour"))\';'
        "ls /usr/share /etc/ssl 2>&1; test -e /usr/bin/seq || echo removed"
    )
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        box.run(
            "rm /usr/bin/seq; rm -r /usr/share; mkdir /usr/share; touch /usr/share/new", check=True
        )
        box.run(["python3", "-c", _ODD], check=True)
        before = box.run(look).stdout
        found = {change.path: change for change in box.changes()}
        assert found["/usr/bin/seq"].kind == "removed"
        assert found["/usr/share"].kind == "replaced"
        assert found["/home/linked"].digest == hashlib.sha256(b"long").hexdigest()
        assert found["/home/" + "a" * 200].size == 4
        assert found["/home/link"].digest == hashlib.sha256(b"b" * 300).hexdigest()
        assert abs(found["/home/linked"].changed_ns / 1e9 - time.time()) < 60
        reference = box.snapshot()
    with Sandbox.create(MicroVMSpec(from_=reference)) as again:
        assert again.run(look).stdout == before
    assert "removed" in before
    assert "1234567890" in before


def test_a_name_that_layers_cannot_have_is_refused(node, image):
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        box.run("touch /home/.wh.x", check=True)
        with pytest.raises(SandboxFileError) as caught:
            box.snapshot()
        assert caught.value.errno == errno.EILSEQ
        assert box.run("echo goes on").stdout == "goes on\n"


def test_what_a_machine_cannot_do_is_said(node, image):
    with (
        Sandbox.create(MicroVMSpec(image=image)) as box,
        pytest.raises(UnsupportedError, match="call"),
    ):
        box.call("def f(): return 1")


def test_the_host_is_no_image_of_a_machine(node):
    with pytest.raises(ImageError, match="cannot be the disks") as caught:
        Sandbox.create(MicroVMSpec())
    assert "import" in caught.value.hint


def untold():
    """How many boxes the node has of which it tells nobody."""

    async def count():
        async with AsyncNode() as node:
            return (await node.status()).boxes - len(await node.boxes())

    return asyncio.run(count())


def those_of_other_tests():
    """How many those are that stay: a box of a test before this one may be ending still."""
    found = untold()
    while True:
        time.sleep(1)
        last, found = found, untold()
        if last == found:
            return found


def wait_for_spare(others=0):
    """Wait until there is one more than those of other tests."""
    end = time.monotonic() + 60
    while untold() != others + 1:
        assert time.monotonic() < end, "no spare"
        time.sleep(0.1)
    time.sleep(1)  # it runs a command before it is given away


def test_a_spare_is_given_to_the_next_who_asks(node, image):
    """It has been started before it is asked for, is told of to nobody else, and is a box like any other."""
    spec = MicroVMSpec(image=image, spare=1, pids=333)
    with Sandbox.create(spec):
        wait_for_spare()
        changed = spec.model_copy(
            update={"env": {"A": "b"}, "labels": {"c": "d"}, "user": "1", "spare": 0}
        )
        with Sandbox.create(changed, name="mine", trajectory="of-a-spare") as box:
            assert untold() == 0
            info = box.info()
            assert (info.name, info.trajectory, info.labels) == ("mine", "of-a-spare", {"c": "d"})
            assert box.run("echo $A; id -u; hostname").stdout == f"b\n1\n{box.id}\n"
            assert [event.position for event in box.log()] == [1]
            (copy,) = box.fork()
            assert copy.run("hostname").stdout == f"{copy.id}\n"
            copy.kill()
        with Sandbox.create(spec):  # none is ready: it is started, and another one beside it
            wait_for_spare()
            with Sandbox.create(MicroVMSpec(image=image, pids=334)):
                assert untold() == 1  # it is of another kind, and waits


def test_a_spare_may_start_from_a_snapshot(node, image):
    """It stands on that, whatever `image` says."""
    others = those_of_other_tests()
    with Sandbox.create(MicroVMSpec(image=image)) as box:
        box.run("echo kept > /etc/kept", check=True)
        spec = MicroVMSpec.model_validate({"from": box.snapshot(), "spare": 1})
    with Sandbox.create(spec):
        wait_for_spare(others)
        with Sandbox.create(spec.model_copy(update={"spare": 0})) as box:
            assert untold() == others
            assert box.run("cat /etc/kept").stdout == "kept\n"


def test_a_spare_stands_on_what_its_name_means_now(node, tmp_path):
    """An image that is made anew under its name is the one that machines have from then on."""
    needs_machines()
    others = those_of_other_tests()
    store = node / "node" / "images"
    spec = MicroVMSpec(image=import_image(store, tmp_path, "moving:1"), spare=1)
    with Sandbox.create(spec):
        wait_for_spare(others)
        import_image(store, tmp_path, "moving:1", files={"etc/which": "the second"})
        with Sandbox.create(spec.model_copy(update={"spare": 0})) as box:
            assert box.run("cat /etc/which").stdout == "the second"

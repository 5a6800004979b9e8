"""What is around a virtual machine: QEMU has nothing but the machine, and root in the machine nothing but itself."""

import os
import re
import socket
import stat
from pathlib import Path

import pytest

from hadal.errors import NodeError, SandboxGoneError
from hadal.node.machines.jail_files import open_file, socket_path
from hadal.sandbox import MicroVMSpec, NetworkPolicy, Sandbox
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines, qemu_of
from tests.sandbox.network_lab import needs_network

pytestmark = needs_root


@pytest.fixture(scope="module")
def image(node, kernel, tmp_path_factory):
    needs_machines()
    return import_image(node / "images", tmp_path_factory.mktemp("image"))


@pytest.fixture
def box(image):
    with Sandbox.create(MicroVMSpec(image=image)) as made:
        yield made


def test_qemu_is_nobody_on_the_host(box):
    pid = qemu_of(box)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert min(map(int, status["Uid"].split())) >= 1 << 20
    assert min(map(int, status["Gid"].split())) >= 1 << 20
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["Seccomp"].strip() == "2"
    assert status["NoNewPrivs"].strip() == "1"
    for kind in ("mnt", "net", "pid", "ipc", "uts", "user", "cgroup"):
        own = Path(f"/proc/self/ns/{kind}").readlink()
        assert Path(f"/proc/{pid}/ns/{kind}").readlink() != own, kind
    links = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in links] == ["lo"]


def test_qemu_has_open_what_its_machine_is_made_of(box):
    pid = qemu_of(box)
    opened = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    known = re.compile(
        r"pipe:.*|socket:.*|anon_inode:.*|/memfd:hadal-machine.*|/layers/\d+|/disks/\d+|/machine/disk|/dev/u?random|/dev/null"
    )
    assert [name for name in opened if not known.fullmatch(name)] == []


def test_what_qemu_may_write_is_its_machine_alone(box, tmp_path):
    """As its jail sees it: with the host's /usr, which it cannot write, and no other box."""
    pid = qemu_of(box)
    root = Path(f"/proc/{pid}/root")
    (tmp_path / "secret").write_text("of the host")
    assert not (root / str(tmp_path / "secret").lstrip("/")).exists()
    assert not (root / "etc/shadow").exists()
    assert sorted(p.name for p in (root / "machine").iterdir()) == ["disk", "port", "qmp"]
    for line in Path(f"/proc/{pid}/mounts").read_text().splitlines():
        _, point, _, options = line.split()[:4]
        if point.startswith(("/layers", "/disks", "/boot", "/usr")):
            assert "ro" in options.split(","), line


def test_root_in_a_machine_cannot_change_what_others_boot_from(box, image):
    """The layers of its image and the disk of its template are read-only, whatever its kernel does."""
    box.run("cat /proc/partitions", check=True)
    for disk in box.run("ls /sys/block").stdout.split():
        serial = box.run(f"cat /sys/block/{disk}/serial").stdout
        if serial.startswith("layer"):
            assert box.run(f"cat /sys/block/{disk}/ro").stdout == "1\n"
            box.run(
                f"echo 0 > /sys/block/{disk}/ro; dd if=/dev/zero of=/dev/{disk} bs=4096 count=9 oflag=direct"
            )
    with Sandbox.create(MicroVMSpec(image=image)) as other:
        assert other.run("ls /usr/bin | head -1").exit_code == 0
    assert "qemu" not in box.run("ps aux").stdout


def test_a_machine_that_falls_takes_nobody_with_it(box, image):
    fall = (
        "dd if=/dev/urandom of=/dev/mem bs=4096 count=4096; echo c > /proc/sysrq-trigger; sleep 60"
    )
    with Sandbox.create(MicroVMSpec(image=image)) as falling, pytest.raises(SandboxGoneError):
        falling.run(fall)
    assert box.run("echo stands").stdout == "stands\n"


def test_the_monitor_is_out_of_reach_of_the_guest(box):
    """Neither its console nor its port leads to what governs QEMU."""
    found = box.run(
        "ls /sys/class/virtio-ports; ls /dev/vport* /dev/hvc*; cat /sys/class/virtio-ports/*/name"
    ).stdout
    assert re.findall(r"^\w+$", found, re.MULTILINE).count("hadal") == 1
    assert len(set(re.findall(r"vport\d+p\d+", found))) == 1


@needs_network
def test_machines_do_not_reach_each_other(image):
    policy = NetworkPolicy(default="deny")
    with (
        Sandbox.create(MicroVMSpec(image=image, network=policy)) as one,
        Sandbox.create(MicroVMSpec(image=image, network=policy)) as other,
    ):
        address = other.run(
            "ip -4 -o addr show eth0 | tr -s ' ' | cut -d ' ' -f 4 | cut -d / -f 1"
        ).stdout.strip()
        server = other.spawn("python3 -m http.server 80 --bind 0.0.0.0")
        tried = one.run(
            f"timeout 5 bash -c '> /dev/tcp/{address}/80'; timeout 5 bash -c '> /dev/tcp/10.201.0.1/22'"
        )
        assert tried.exit_code != 0
        assert f"{address}:80/tcp" in {d["target"] for d in one.network()["denials"]}
        server.kill()


def test_files_of_machines_are_of_root_alone(box, node):
    """No other user of the host comes to their memory or their disks."""
    for folder in (node / "b", *(node / "machines/templates").iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0, folder


@pytest.mark.parametrize("name", ["disk", "devices"])
def test_what_breaks_out_of_a_machine_reads_nothing_by_a_link(box, node, tmp_path, name):
    """Its folder is all that it can write: a copy of it must not be of what a link there leads to."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    folder = node / "b" / box.id / "vm"
    # QEMU would follow a link for its devices in its jail, where there is no such file.
    if name == "devices":
        (folder / name).symlink_to(secret)
    else:
        (folder / name).rename(folder / "moved")
        (folder / name).symlink_to(secret)
    with pytest.raises(NodeError):
        box.fork()
    with pytest.raises(NodeError):
        box.snapshot("stolen", kind="full")
    assert secret.read_bytes() == b"secret" * 1000
    assert not list((node / "machines").rglob("stolen"))


def test_only_files_and_sockets_of_their_kind_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        (tmp_path / "lead").symlink_to(tmp_path / "socket")
        with socket_path(tmp_path / "socket") as path, socket.socket(socket.AF_UNIX) as reaching:
            reaching.connect(path)
        os.close(open_file(tmp_path / "file"))
        for name in ("link", "pipe", "socket", "lead"):
            with pytest.raises(NodeError, match=f"{name} of a machine is no file"):
                open_file(tmp_path / name)
        for name in ("link", "pipe", "file", "lead"):
            with pytest.raises(NodeError, match="is no socket"), socket_path(tmp_path / name):
                pass

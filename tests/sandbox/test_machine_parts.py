"""What machines boot from: kernels and their modules, and the initial RAM disk."""

import json
import logging
import os
import re
import shutil
import stat
import subprocess

import pytest

from hadal.cli.main import app
from hadal.errors import ConfigError, UnsupportedError
from hadal.node.machines import kvm
from hadal.node.machines.choice import Choice
from hadal.node.machines.initramfs import make_initramfs
from hadal.node.machines.kernel import fetch_kernel, find_kernel, install_kernel
from hadal.node.machines.kvm import choose_accelerator
from hadal.node.machines.qemu import Hardware, qemu_call

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
NEEDED = {
    "virtio_mmio": "virtio,virtio_ring", "virtio_pci": "virtio", "virtio_blk": "virtio,virtio_ring",
    "virtio_console": "", "virtio_net": "net_failover", "virtio-rng": "", "virtio_balloon": "virtio",
    "erofs": "libcrc32c", "overlay": "", "virtio": "virtio_ring", "virtio_ring": "", "libcrc32c": "",
    "net_failover": "failover", "failover": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_kernel_of_the_user(monkeypatch):
    monkeypatch.delenv("HADAL_KERNEL", raising=False)


def install(root, version="6.1", leave_out=(), builtin=("crc32c_generic",)):
    """A kernel as its package has it; the modules say only what they need."""
    modules = root / "lib/modules" / version
    (modules / "kernel").mkdir(parents=True)
    (root / "boot").mkdir(exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")
    text = "".join(f"kernel/lib/{name.replace('_', '-')}.ko\n" for name in builtin)
    (modules / "modules.builtin").write_text(text)
    for name, needs in NEEDED.items():
        if name not in leave_out:
            content = b"\x7fELF\0license=GPL\0depends=" + needs.encode() + b"\0name=x\0"
            (modules / "kernel" / f"{name}.ko").write_bytes(content)


def test_modules_come_after_what_they_need(tmp_path):
    install(tmp_path)
    kernel = find_kernel(tmp_path)
    assert kernel.image == tmp_path / "boot/vmlinuz-6.1"
    order = [path.stem for path in kernel.needed_modules()]
    assert sorted(order) == sorted(NEEDED)
    for name, needs in NEEDED.items():
        assert all(order.index(other) < order.index(name) for other in needs.split(",") if other)


def test_what_is_built_in_needs_no_module(tmp_path):
    install(tmp_path, leave_out={"erofs", "libcrc32c"}, builtin=("crc32c_generic", "erofs"))
    assert "erofs" not in [path.stem for path in find_kernel(tmp_path).needed_modules()]


def test_a_missing_module_is_named(tmp_path):
    install(tmp_path, leave_out={"libcrc32c"})
    with pytest.raises(UnsupportedError, match="libcrc32c"):
        find_kernel(tmp_path).needed_modules()


def test_a_folder_of_the_user_comes_before_that_of_the_node_and_no_kernel_says_what_to_do(
    tmp_path, monkeypatch
):
    install(tmp_path / "mine")
    monkeypatch.setenv("HADAL_KERNEL", str(tmp_path / "mine"))
    assert find_kernel(tmp_path).image == tmp_path / "mine/boot/vmlinuz-6.1"
    monkeypatch.setenv("HADAL_KERNEL", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="none") as caught:
        find_kernel(tmp_path)
    assert "linux-image-cloud-amd64" in caught.value.hint


def make_package(folder):
    """The file of a package of a kernel."""
    install(folder / "tree")
    (folder / "tree/DEBIAN").mkdir()
    about = "Package: kernel\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: x\n"
    (folder / "tree/DEBIAN/control").write_text(about)
    package = folder / "kernel.deb"
    subprocess.run(["dpkg-deb", "-b", folder / "tree", package], check=True, capture_output=True)
    return package


@needs_dpkg
def test_a_kernel_comes_out_of_a_package(tmp_path):
    package = make_package(tmp_path)
    folder = tmp_path / "state/machines/kernel"
    install(folder, version="5.0")
    assert install_kernel(package, folder).image == folder / "boot/vmlinuz-6.1"
    assert [p.name for p in (folder / "boot").iterdir()] == ["vmlinuz-6.1"]
    package.write_bytes(package.read_bytes()[:-200])
    with pytest.raises(ConfigError, match=r"kernel\.deb"):
        install_kernel(package, folder)
    assert find_kernel(folder).image == folder / "boot/vmlinuz-6.1"


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Make an apt that does as it is told: by a shell script for each of its two programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def does(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return does


@needs_dpkg
def test_a_kernel_is_fetched_by_the_name_that_the_newest_has(tmp_path, apt, capsys):
    package = make_package(tmp_path)
    apt(
        "apt-cache",
        "echo linux-image-cloud-amd64; echo '  Depends: linux-image-6.1.0-1-cloud-amd64'",
    )
    apt("apt-get", f'[ "$*" = "download -q linux-image-6.1.0-1-cloud-amd64" ] && cp {package} .')
    app(
        ["node", "kernel", "--state", str(tmp_path / "state"), "--json"],
        result_action="return_value",
    )
    image = tmp_path / "state/machines/kernel/boot/vmlinuz-6.1"
    assert json.loads(capsys.readouterr().out)["kernel"] == str(image)
    assert image.exists()


def test_why_no_kernel_is_fetched_is_said(tmp_path, apt, monkeypatch):
    apt("apt-cache", "true")
    with pytest.raises(UnsupportedError, match="does not know linux-image-cloud-amd64") as caught:
        fetch_kernel(tmp_path)
    assert "apt-get update" in caught.value.hint
    apt("apt-cache", "echo '  Depends: linux-image-1'")
    apt("apt-get", "echo 'E: no network' >&2; exit 100")
    with pytest.raises(ConfigError, match="no network"):
        fetch_kernel(tmp_path)
    apt("apt-get", "true")
    with pytest.raises(ConfigError, match="fetched no linux-image-1"):
        fetch_kernel(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnsupportedError, match="no apt-cache"):
        fetch_kernel(tmp_path)


def entries(archive):
    """Name, mode and content of each entry of an archive of cpio's newc format."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return
        yield name, fields[1], archive[at : at + size]
        at = (at + size + 3) & ~3


def test_the_initial_disk_has_the_program_and_the_modules_in_order(tmp_path):
    for name in ("program", "b.ko", "a.ko"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    found = {
        name: (mode, content)
        for name, mode, content in entries(
            make_initramfs(tmp_path / "program", [tmp_path / "b.ko", tmp_path / "a.ko"])
        )
    }
    assert list(found) == ["modules", "init", "modules/b.ko", "modules/a.ko", "modules/order"]
    assert stat.S_ISDIR(found["modules"][0])
    assert found["init"] == (stat.S_IFREG | 0o755, b"program" * 3)
    assert found["modules/order"][1] == b"b.ko\na.ko\n"


def test_modules_have_no_signatures_to_look_at(tmp_path):
    signature = b"s" * 300
    about = bytes(8) + len(signature).to_bytes(4, "big")
    (tmp_path / "a.ko").write_bytes(
        b"module" + signature + about + b"~Module signature appended~\n"
    )
    (tmp_path / "program").touch()
    made = make_initramfs(tmp_path / "program", [tmp_path / "a.ko"])
    assert {name: content for name, _, content in entries(made)}["modules/a.ko"] == b"module"


def hardware(accelerator):
    return Hardware(
        board="microvm", memory_mb=128, cpus=1, layers=1, network=False, accelerator=accelerator, tsc_khz=2_000_000,
    )  # fmt: skip


def test_an_emulated_machine_is_told_its_frequency_and_one_with_kvm_measures_it():
    emulated = qemu_call("qemu", hardware("tcg"), {"layers": 1})
    assert "tsc_early_khz=2000000 mitigations=off hadal_layers=1" in emulated[-1]
    assert emulated[emulated.index("-accel") + 1].startswith("tcg,")
    real = qemu_call("qemu", hardware("kvm"), {"layers": 1})
    assert not {"tsc_early_khz", "mitigations"} & set(re.split("[ =]", real[-1]))
    assert real[real.index("-accel") : real.index("-accel") + 4] == [
        "-accel",
        "kvm",
        "-cpu",
        "host",
    ]


def test_kvm_is_used_where_a_guest_runs_and_said_why_not(monkeypatch, caplog):
    assert choose_accelerator("tcg") == "tcg"
    monkeypatch.setattr(kvm, "kvm_fault", lambda: None)
    assert choose_accelerator("auto") == choose_accelerator("kvm") == "kvm"
    monkeypatch.setattr(kvm, "kvm_fault", lambda: "no such device")
    with caplog.at_level(logging.INFO):
        assert choose_accelerator("auto") == "tcg"
    assert "emulated: KVM runs no guest here: no such device" in caplog.text
    with pytest.raises(UnsupportedError, match="no such device"):
        choose_accelerator("kvm")


def test_firecracker_is_not_emulated():
    with pytest.raises(ConfigError, match="Firecracker needs KVM"):
        Choice("tcg", "firecracker").made()


def test_the_trial_of_kvm_is_that_of_the_doctor():
    try:
        kvm.run_guest()
        fault = None
    except OSError as error:
        fault = str(error)
    assert kvm.kvm_fault() == fault

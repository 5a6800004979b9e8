"""Machines that are kept with their memory: named, listed, replaced, removed, refused; damage is seen."""

import os

import pytest

from hadal.errors import ConfigError, ImageError
from hadal.node.machines import memory
from hadal.node.machines.kept import KeptMachine, KeptMachines, check_alike, is_kept
from hadal.node.machines.snapshots import Snapshot
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.specs import ContainerSpec, MicroVMSpec


def about(**changes):
    spec = MicroVMSpec(image="x", memory_mb=128).model_dump(mode="json", by_alias=True)
    fields = {
        "reference": "",
        "spec": spec,
        "image": "sha256:0",
        "kind": "k",
        "created_ns": 5,
        "size": 0,
    }
    return KeptMachine(**fields | changes)


@pytest.fixture
def snapshot(tmp_path):
    folder = tmp_path / "copy"
    (folder / "disks").mkdir(parents=True)
    for name in ("devices", "disks/0", "disks/1"):
        (folder / name).write_bytes(name.encode() * 999)
    (tmp_path / "memory").write_bytes(b"m" * 8192 + bytes(1 << 20) + b"end")
    descriptor = memory.load_memory(tmp_path / "memory")
    yield Snapshot(folder, descriptor)
    os.close(descriptor)


@pytest.fixture
def kept(tmp_path):
    return KeptMachines(tmp_path / "kept")


def test_what_is_kept_is_found_by_another_daemon(kept, snapshot, tmp_path):
    reference = kept.keep("ready", snapshot, about())
    assert reference == "machine@ready"
    assert is_kept(reference)
    again = KeptMachines(tmp_path / "kept")
    found = again.about(reference)
    assert (found.image, found.spec["memory_mb"], found.reference) == ("sha256:0", 128, reference)
    assert found.size > 8000
    with again.opened(reference) as opened:
        data = os.pread(opened.memory, 2 << 20, 0)
        assert data == b"m" * 8192 + bytes(1 << 20) + b"end"
        assert opened.devices.read_bytes() == b"devices" * 999
        assert sorted(p.name for p in opened.disks.iterdir()) == ["0", "1"]
    assert [one.reference for one in again.list()] == [reference]


def test_a_name_means_what_was_kept_last(kept, snapshot, tmp_path):
    kept.keep("a", snapshot, about(created_ns=1))
    kept.keep("a", snapshot, about(created_ns=2))
    other = kept.keep(None, snapshot, about(created_ns=0))
    assert [one.created_ns for one in kept.list()] == [0, 2]
    kept.remove("machine@a")
    assert [one.reference for one in kept.list()] == [other]
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [other.removeprefix("machine@")]
    for use in (kept.about, kept.remove, lambda name: kept.opened(name).__enter__()):
        with pytest.raises(ImageError, match="no machine was kept as machine@a"):
            use("machine@a")


@pytest.mark.parametrize("name", ["", ".x", "a/b", "../a", " a", "a\n", "x" * 200])
def test_odd_names_are_refused(kept, snapshot, name):
    with pytest.raises(ConfigError, match="can be called"):
        kept.keep(name, snapshot, about())
    with pytest.raises((ConfigError, ImageError)):
        kept.remove(f"machine@{name}")


@pytest.mark.parametrize("name", ["memory", "devices", "disks/1", "about.json"])
def test_damage_is_seen(kept, snapshot, tmp_path, name):
    reference = kept.keep("a", snapshot, about())
    path = tmp_path / "kept/a" / name
    path.chmod(0o600)
    data = path.read_bytes()
    path.unlink()  # it may be shared with the copy
    path.write_bytes(data[:-1])
    with pytest.raises(ImageError, match="machine@a is damaged"), kept.opened(reference):
        pass


def test_holes_that_a_file_system_makes_or_fills_are_no_damage(kept, snapshot, tmp_path):
    """Seen on ext4: what mke2fs has written is described otherwise once it is on the disk."""
    with (snapshot.folder / "disks/1").open("r+b") as file:
        file.truncate(3 << 20)
        os.pwrite(file.fileno(), b"x", 5000)
        os.pwrite(file.fileno(), b"y", 2 << 20)
    reference = kept.keep("a", snapshot, about())
    path = tmp_path / "kept/a/disks/1"
    path.chmod(0o600)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(1 << 20), 1 << 20)  # zeros where there was a hole
    with kept.opened(reference):
        pass
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"z", 1 << 20)
    with pytest.raises(ImageError, match="machine@a is damaged"), kept.opened(reference):
        pass


def test_what_an_earlier_daemon_left_half_done_is_removed(kept, snapshot, tmp_path):
    kept.keep("a", snapshot, about())
    (tmp_path / "kept/.half").mkdir()
    assert len(kept.list()) == 1
    kept.sweep()
    assert not (tmp_path / "kept/.half").exists()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (MicroVMSpec(memory_mb=256), "memory_mb: machine@a has 128, got 256"),
        (MicroVMSpec(memory_mb=128, cpus=2), "cpus: machine@a has 1.0, got 2.0"),
        (
            MicroVMSpec(memory_mb=128, network=NetworkPolicy(default="deny")),
            "network: machine@a was made without one",
        ),
        (ContainerSpec(), "cannot go on as a container"),
    ],
)
def test_a_machine_goes_on_with_what_it_has(spec, text):
    kept = about(reference="machine@a")
    check_alike(MicroVMSpec(memory_mb=128, env={"A": "b"}, ttl_s=5), kept)
    with pytest.raises(ConfigError, match=text):
        check_alike(spec, kept)

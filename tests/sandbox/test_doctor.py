"""`hadal doctor`: it says what is so, and leaves nothing behind."""

import json
import os
from pathlib import Path

import pytest

from hadal.node.doctor import Finding, verdicts
from hadal.node.doctor.finding import attempt, run_tool
from tests.sandbox.command_line import CommandLine
from tests.sandbox.conftest import needs_root

_GROUPS = Path("/sys/fs/cgroup")


def left_behind():
    """Everything that a probe could leave: mounts, groups, loop devices, interfaces."""
    own = {p.name for p in _GROUPS.glob("*/hadal/doctor-*")} if _GROUPS.exists() else set()
    mounts = [m for m in Path("/proc/self/mountinfo").read_text().splitlines() if "doctor" in m]
    loops = [
        p for p in Path("/sys/block").glob("loop*/loop/backing_file") if "doctor" in p.read_text()
    ]
    links = [p.name for p in Path("/sys/class/net").iterdir() if p.name.startswith("hd")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        links = []  # of the boxes of other tests
    return own, mounts, loops, links


@needs_root
def test_report(tmp_path):
    hadal = CommandLine(tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    namespaces = {
        kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("mnt", "net", "user")
    }
    report = json.loads(hadal.text("doctor", "--json", "--state", state))
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["a whole box"]["ok"], found
    assert {
        "guest program",
        "overlayfs",
        "EROFS",
        "control groups",
        "KVM",
        "disks that boot",
        "UEFI",
        "inotify",
    } <= set(found)
    assert [f for f in found.values() if not (f["ok"] or f["fix"])] == []
    backends = {verdict["backend"]: verdict for verdict in report["backends"]}
    assert list(backends) == ["container", "function", "microvm", "vm"]
    assert backends["container"]["works"], report
    assert not list(state.iterdir())
    assert left_behind() == (set(), [], [], [])
    assert namespaces == {
        kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in namespaces
    }


@pytest.mark.slow
@needs_root
def test_without_the_tools(tmp_path):
    hadal = CommandLine(tmp_path)
    hadal.environment["PATH"] = "/nowhere"
    table = hadal.text("doctor", "--state", tmp_path)
    assert "container: works" in table
    assert "apt-get install qemu-system-x86" in table


def test_a_probe_that_dies_is_a_finding():
    assert not attempt("nosuch").ok
    assert "KeyError" in attempt("nosuch").detail
    late = attempt("idmap", "/nonexistent", limit_s=0.001)
    assert late.detail == "no answer within 0 s"
    assert not run_tool("/no/such/tool").ok


NEEDED = [
    "guest program", "privileges", "namespaces", "id-mapped mounts", "overlayfs",
    "overlay with mapped ids", "seccomp", "control groups", "loop devices", "a whole box", "EROFS", "disk limits", "FUSE",
    "networks",
]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "works"),
        ({"EROFS": "limited", "networks": "limited"}, "works without: EROFS, networks"),
        ({"seccomp": "missing", "EROFS": "limited"}, "does not: seccomp"),
    ],
)
def test_verdicts(changed, text):
    findings = [Finding(name, changed.get(name, "ok"), "") for name in NEEDED]
    container, function, *machines = verdicts(findings)
    assert container.text == function.text == text
    assert container.works == text.startswith("works")
    assert not any(machine.works for machine in machines)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "works, with KVM"),
        ({"KVM": "limited"}, "works, emulated"),
        ({"KVM": "limited", "networks": "limited"}, "works, emulated, without: networks"),
        ({"QEMU": "limited", "machine kernel": "limited"}, "does not: QEMU, machine kernel"),
        ({"seccomp": "missing"}, "does not: seccomp"),
    ],
)
def test_a_machine_needs_what_its_jail_needs_and_a_kernel(changed, text):
    names = (*NEEDED, "KVM", "QEMU", "machine kernel")
    findings = [Finding(name, changed.get(name, "ok"), "") for name in names]
    assert [verdict.text for verdict in verdicts(findings)[2:]] == [text, text]

"""What the findings mean for each kind of box."""

from collections.abc import Sequence
from dataclasses import dataclass

from hadal.node.doctor.finding import Finding

__all__ = ["Verdict", "verdicts"]

_CONTAINER = (
    "guest program", "privileges", "namespaces", "id-mapped mounts", "overlayfs",
    "overlay with mapped ids", "seccomp", "control groups", "loop devices", "disk limits", "a whole box",
)  # fmt: skip
_LIMITED_WITHOUT = ("EROFS", "FUSE", "networks")
_MACHINE = (*_CONTAINER, "EROFS", "QEMU", "machine kernel")
_SHARED = ("container", "function")
"""Kinds of boxes that have the node's kernel."""
_OWN = ("microvm", "vm")
"""Kinds of boxes that have a kernel of their own."""


@dataclass(frozen=True)
class Verdict:
    """What a kind of box does here.

    Attributes:
        backend: "container", "function", "microvm" or "vm".
        works: Whether it does at all.
        text: "works", "works without: ..." or "does not: ...".
    """

    backend: str
    works: bool
    text: str


def verdicts(findings: Sequence[Finding]) -> list[Verdict]:
    """Return a verdict for every kind of box."""
    by_name = {finding.name: finding for finding in findings}
    return [
        *(_shared_kernel(backend, by_name) for backend in _SHARED),
        *(_machine(backend, by_name) for backend in _OWN),
    ]


def _lacking(by_name: dict[str, Finding], names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in by_name or not by_name[name].ok]


def _shared_kernel(backend: str, by_name: dict[str, Finding]) -> Verdict:
    missing = [n for n in _CONTAINER if n not in by_name or by_name[n].state == "missing"]
    if missing:
        return Verdict(backend, works=False, text=f"does not: {', '.join(missing)}")
    without = _lacking(by_name, _LIMITED_WITHOUT)
    text = f"works without: {', '.join(without)}" if without else "works"
    return Verdict(backend, works=True, text=text)


def _machine(backend: str, by_name: dict[str, Finding]) -> Verdict:
    """Say what a kind of machine lacks; its jail is a container."""
    missing = _lacking(by_name, _MACHINE)
    if missing:
        return Verdict(backend, works=False, text=f"does not: {', '.join(missing)}")
    without = _lacking(by_name, ("networks",))
    limits = f", without: {', '.join(without)}" if without else ""
    how = "emulated" if _lacking(by_name, ("KVM",)) else "with KVM"
    return Verdict(backend, works=True, text=f"works, {how}{limits}")

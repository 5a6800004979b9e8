"""How QEMU is called: everything that makes one machine what it is.

Paths are those of its jail: `/machine` is the box's folder, which it may write; kernel, initial RAM disk,
layers, and the disks that its own stands on are files that it may read.
"""

import shutil
from dataclasses import dataclass

from hadal.errors import UnsupportedError
from hadal.node.machines.memory import DESCRIPTOR

__all__ = ["BOOT", "DISKS", "FOLDER", "LAYERS", "Hardware", "microvm", "qemu_program"]

FOLDER = "/machine"
BOOT = "/boot"
LAYERS = "/layers"
DISKS = "/disks"
_PROGRAM = "qemu-system-x86_64"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a machine has.

    Attributes:
        memory_mb: MiB of memory.
        cpus: Processors.
        layers: Number of disks with layers of its image.
        network: Whether it has a network, of which QEMU has the file.
        tsc_khz: Of the host's time stamp counter, which an emulated processor passes on.
    """

    memory_mb: int
    cpus: int
    layers: int
    network: bool
    tsc_khz: int


def qemu_program() -> str:
    """Return the path of QEMU, which the jail has at the same place.

    Raises:
        UnsupportedError: It is not installed, or not where jails see it.
    """
    found = shutil.which(_PROGRAM)
    if found is None or not found.startswith("/usr/"):
        raise UnsupportedError(
            f"no {_PROGRAM} in /usr: {found or 'not installed'}",
            hint="Debian: apt-get install qemu-system-x86",
        )
    return found


def _file(name: str, path: str, *more: str, driver: str = "raw", read_only: bool = True) -> tuple[str, str]:  # fmt: skip
    fixed = "on" if read_only else "off"
    return "-blockdev", ",".join(
        (driver, f"node-name={name},read-only={fixed},file.driver=file,file.filename={path}", *more)
    )


def _device(name: str) -> tuple[str, str]:
    return "-device", f"virtio-blk-device,drive={name},serial={name}"


def _scratch(below: int) -> list[tuple[str, str]]:
    """Return what a machine writes: a raw disk, or one that has what differs from others below it."""
    top = f"{FOLDER}/disk"
    if below == 0:
        return [_file("scratch", top, "discard=unmap", read_only=False), _device("scratch")]
    chain = [_file("below0", f"{DISKS}/0")]
    chain += [
        _file(f"below{n}", f"{DISKS}/{n}", f"backing=below{n - 1}", driver="qcow2")
        for n in range(1, below)
    ]
    more = ("discard=unmap", f"backing=below{below - 1}")
    return [
        *chain,
        _file("scratch", top, *more, driver="qcow2", read_only=False),
        _device("scratch"),
    ]


def microvm(
    program: str, hardware: Hardware, options: dict[str, int], *, below: int = 0
) -> list[str]:
    """Return the call for a `microvm` machine: virtio-mmio found through ACPI, no PCI, no BIOS to speak of.

    Args:
        program: QEMU.
        hardware: Of the machine.
        options: For the first process of the machine, which finds them in its environment.
        below: How many disks its own stands on. If it stands on some, it waits for the state of the devices of
            a snapshot; else it boots.
    """
    # Without a timer to measure its counter by, an emulated processor hangs at boot: it is told.
    # With no clock to read it waits for one, twice for a second. What it does against speculation costs time, and
    # an emulated processor does not speculate.
    line = f"console=ttyS0 quiet tsc_early_khz={hardware.tsc_khz} tsc=nowatchdog reboot=t panic=-1 mitigations=off"
    line += "".join(f" hadal_{name}={value}" for name, value in options.items())
    waits = below > 0
    disks = [
        part
        for n in range(hardware.layers)
        for part in (_file(f"layer{n}", f"{LAYERS}/{n}"), _device(f"layer{n}"))
    ]
    disks += _scratch(below)
    # Its hardware address is told to the guest: that of a template is another's.
    card = (
        "-netdev",
        f"tap,id=network,fd={DESCRIPTOR + 1}",
        "-device",
        "virtio-net-device,netdev=network",
    )
    return [
        program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        # The memory is a descriptor of the jail: the machine's own, or that of a template, mapped privately.
        # A state without a head is one of devices only.
        "-object", f"memory-backend-file,id=memory,size={hardware.memory_mb}M,mem-path=/proc/self/fd/{DESCRIPTOR},share={'off' if waits else 'on'}",
        "-global", "migration.send-configuration=off",
        *(("-S", "-incoming", "defer") if waits else ()),
        "-M", "microvm,pic=off,pit=off,rtc=on,suppress-vmdesc=on,memory-backend=memory", "-accel", "tcg", "-cpu", "max",
        "-smp", str(hardware.cpus), "-m", str(hardware.memory_mb),
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-qmp", f"unix:{FOLDER}/qmp,server=on,wait=off",
        "-device", "virtio-serial-device",
        "-chardev", f"socket,id=port,path={FOLDER}/port,server=on,wait=off",
        "-device", "virtserialport,chardev=port,name=hadal",
        "-device", "virtio-rng-device",
        *(part for disk in disks for part in disk),
        *(card if hardware.network else ()),
        "-kernel", f"{BOOT}/kernel", "-initrd", f"{BOOT}/initrd", "-append", line,
    ]  # fmt: skip

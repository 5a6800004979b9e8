"""How QEMU is called: everything that makes one machine what it is.

Paths are those of its jail: `/machine` is the box's folder, which it may write; kernel, initial RAM disk,
layers, and the disks that its own stands on are files that it may read.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from hadal.errors import UnsupportedError
from hadal.node.machines.memory import DESCRIPTOR

__all__ = [
    "BOOT",
    "DISKS",
    "FOLDER",
    "LAYERS",
    "MEMORY_OF_QEMU_MB",
    "SEED",
    "Hardware",
    "qemu_call",
    "qemu_program",
    "uefi_firmware",
]

FOLDER = "/machine"
BOOT = "/boot"
LAYERS = "/layers"
DISKS = "/disks"
SEED = "/seed"
_PROGRAM = "qemu-system-x86_64"
_UEFI = ("/usr/share/ovmf/OVMF.fd", "/usr/share/edk2/x64/OVMF.4m.fd")
"""Where distributions have OVMF with its variables, which do not outlive a machine."""
_LAYERS_PLACE = 0x10
_TRANSLATED_MB = 128
"""Of code that QEMU has translated: then it begins anew."""
MEMORY_OF_QEMU_MB = _TRANSLATED_MB + 128
"""Beside that of the machine."""


@dataclass(frozen=True, kw_only=True)
class _Board:
    """What the devices of a machine are attached to.

    Attributes:
        machine: Of QEMU.
        bus: What its devices are called after.
        more: Devices that no other board has.
    """

    machine: str
    bus: str
    more: tuple[str, ...] = ()


_BOARDS = {
    # virtio-mmio found through ACPI, no PCI, no BIOS to speak of.
    "microvm": _Board(machine="microvm,pic=off,pit=off,rtc=on", bus="device"),
    # What virtio-vga shows is in the state of the device, as soon as its driver runs.
    "vm": _Board(
        machine="q35,vmport=off",
        bus="pci",
        more=(
            "-device", "virtio-vga", "-device", "qemu-xhci,id=usb", "-device", "usb-tablet,bus=usb.0",
        ),
    ),
}  # fmt: skip


_ACCELERATORS = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    # Without "erms" kernels copy eight bytes at a time and not one, which emulation does as fast.
    "tcg": ("-accel", f"tcg,tb-size={_TRANSLATED_MB}", "-cpu", "max,-erms"),
}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a machine has.

    Attributes:
        board: "microvm" or "vm".
        memory_mb: MiB of memory.
        cpus: Processors.
        layers: Number of disks with layers of its image; with none it boots from the disk that it writes.
        network: Whether it has a network, of which QEMU has the file.
        accelerator: "kvm" or "tcg".
        tsc_khz: Of the host's time stamp counter, which an emulated processor passes on; 0 with KVM.
        firmware: Path of the one for UEFI; None for a BIOS.
        seed: Whether it has a disk for cloud-init.
        guest: Whether our program will be in it; else its serial console is a socket.
    """

    board: str
    memory_mb: int
    cpus: int
    layers: int
    network: bool
    accelerator: str
    tsc_khz: int
    firmware: str | None = None
    seed: bool = False
    guest: bool = True


def uefi_firmware() -> str:
    """Return the path of the firmware for UEFI, which the jail has at the same place.

    Raises:
        UnsupportedError: It is not installed.
    """
    for path in _UEFI:
        if Path(path).exists():
            return path
    raise UnsupportedError("no firmware for UEFI", hint="Debian: apt-get install ovmf")


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


def _device(board: _Board, name: str, number: int | None = None) -> tuple[str, str]:
    """Return a disk as a device; of those with a number, eight share a place on the PCI bus."""
    place = ""
    if board.bus == "pci" and number is not None:
        place = f",addr={_LAYERS_PLACE + number // 8:#x}.{number % 8:#x},multifunction=on"
    return "-device", f"virtio-blk-{board.bus},drive={name},serial={name}{place}"


def _scratch(board: _Board, below: int, *, boots: bool) -> list[tuple[str, str]]:
    """Return what a machine writes: a raw disk, or one that has what differs from others below it."""
    top, device = f"{FOLDER}/disk", _device(board, "scratch")
    if boots:
        device = device[0], device[1] + ",bootindex=0"
    if below == 0:
        return [_file("scratch", top, "discard=unmap", read_only=False), device]
    chain = [_file("below0", f"{DISKS}/0")]
    chain += [
        _file(f"below{n}", f"{DISKS}/{n}", f"backing=below{n - 1}", driver="qcow2")
        for n in range(1, below)
    ]
    more = ("discard=unmap", f"backing=below{below - 1}")
    return [
        *chain,
        _file("scratch", top, *more, driver="qcow2", read_only=False),
        device,
    ]


def kernel_line(hardware: Hardware, options: dict[str, int]) -> str:
    """Return the command line of the kernel, whose environment the first process of a machine has."""
    line = "console=ttyS0 quiet tsc=nowatchdog reboot=t panic=-1"
    if hardware.accelerator == "tcg":
        # Without a timer to measure its counter by, an emulated processor hangs at boot: it is told.
        # With no clock to read it waits for one, twice for a second. What it does against speculation costs
        # time, and an emulated processor does not speculate.
        line += f" tsc_early_khz={hardware.tsc_khz} mitigations=off"
    return line + "".join(f" hadal_{name}={value}" for name, value in options.items())


def qemu_call(
    program: str,
    hardware: Hardware,
    options: dict[str, int],
    *,
    below: int = 0,
    waits: bool = False,
    shares: bool = False,
) -> list[str]:
    """Return the call for a machine.

    Args:
        program: QEMU.
        hardware: Of the machine.
        options: For the first process of the machine, which finds them in its environment.
        below: How many disks its own stands on.
        waits: Whether it waits for the state of the devices of a snapshot; else it boots.
        shares: Whether others start from the same memory, so that it is mapped privately.
    """
    line = kernel_line(hardware, options)
    board = _BOARDS[hardware.board]
    bus = board.bus
    disks = [
        part
        for n in range(hardware.layers)
        for part in (_file(f"layer{n}", f"{LAYERS}/{n}"), _device(board, f"layer{n}", n))
    ]
    disks += _scratch(board, below, boots=hardware.layers == 0)
    if hardware.seed:
        disks += [_file("seed", SEED), _device(board, "seed")]
    console = (
        "stdio,id=console,signal=off"
        if hardware.guest
        else f"socket,id=console,path={FOLDER}/console,server=on,wait=off"
    )
    # Its hardware address is told to the guest: that of a template is another's.
    card = (
        "-netdev",
        f"tap,id=network,fd={DESCRIPTOR + 1}",
        "-device",
        f"virtio-net-{bus},netdev=network{',romfile=' if bus == 'pci' else ''}",
    )
    return [
        program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        # The memory is a descriptor of the jail: the machine's own, or that of a template, mapped privately.
        # A state without a head is one of devices only.
        "-object", f"memory-backend-file,id=memory,size={hardware.memory_mb}M,mem-path=/proc/self/fd/{DESCRIPTOR},share={'off' if shares else 'on'}",
        "-global", "migration.send-configuration=off",
        *(("-S", "-incoming", "defer") if waits else ()), *(() if hardware.guest or waits else ("-S",)),
        *(("-bios", hardware.firmware) if hardware.firmware else ()),
        "-M", f"{board.machine},suppress-vmdesc=on,memory-backend=memory", *_ACCELERATORS[hardware.accelerator],
        "-smp", str(hardware.cpus), "-m", str(hardware.memory_mb),
        "-chardev", console, "-serial", "chardev:console",
        "-qmp", f"unix:{FOLDER}/qmp,server=on,wait=off",
        "-device", f"virtio-serial-{bus}",
        "-chardev", f"socket,id=port,path={FOLDER}/port,server=on,wait=off",
        "-device", "virtserialport,chardev=port,name=hadal",
        "-device", f"virtio-rng-{bus}", *board.more,
        *(part for disk in disks for part in disk),
        *(card if hardware.network else ()),
        *(("-kernel", f"{BOOT}/kernel", "-initrd", f"{BOOT}/initrd", "-append", line) if hardware.layers else ()),
    ]  # fmt: skip

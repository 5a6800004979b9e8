"""How QEMU is called: everything that makes one machine what it is.

Paths are those of its jail: `/machine` is the box's folder, which it may write; kernel, initial RAM disk and
layers are files that it may read.
"""

import shutil
from dataclasses import dataclass

from hadal.errors import UnsupportedError

__all__ = ["BOOT", "FOLDER", "LAYERS", "Hardware", "microvm", "qemu_program"]

FOLDER = "/machine"
BOOT = "/boot"
LAYERS = "/layers"
_PROGRAM = "qemu-system-x86_64"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a machine has.

    Attributes:
        memory_mb: MiB of memory.
        cpus: Processors.
        layers: Number of disks with layers of its image.
        tsc_khz: Of the host's time stamp counter, which an emulated processor passes on.
    """

    memory_mb: int
    cpus: int
    layers: int
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


def _disk(name: str, path: str, *, read_only: bool) -> tuple[str, ...]:
    fixed = "on" if read_only else "off"
    return (
        "-blockdev", f"raw,node-name={name},read-only={fixed},file.driver=file,file.filename={path}",
        "-device", f"virtio-blk-device,drive={name},serial={name}",
    )  # fmt: skip


def microvm(
    program: str, hardware: Hardware, options: dict[str, int], *, waits: bool = False
) -> list[str]:
    """Return the call for a `microvm` machine: virtio-mmio found through ACPI, no PCI, no BIOS to speak of.

    Args:
        program: QEMU.
        hardware: Of the machine.
        options: For the first process of the machine, which finds them in its environment.
        waits: Whether it waits for the state of a template's devices instead of booting.
    """
    # Without a timer to measure its counter by, an emulated processor hangs at boot: it is told.
    line = f"console=ttyS0 quiet tsc_early_khz={hardware.tsc_khz} tsc=nowatchdog reboot=t panic=-1"
    line += "".join(f" hadal_{name}={value}" for name, value in options.items())
    disks = [_disk(f"layer{n}", f"{LAYERS}/{n}", read_only=True) for n in range(hardware.layers)]
    disks.append(_disk("scratch", f"{FOLDER}/disk", read_only=False))
    return [
        program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        # The memory is a descriptor of the jail: the machine's own, or that of a template, mapped privately.
        # A state without a head is one of devices only.
        "-object", f"memory-backend-file,id=memory,size={hardware.memory_mb}M,mem-path=/proc/self/fd/4,share={'off' if waits else 'on'}",
        "-global", "migration.send-configuration=off",
        *(("-S", "-incoming", "defer") if waits else ()),
        "-M", "microvm,pic=off,pit=off,rtc=off,suppress-vmdesc=on,memory-backend=memory", "-accel", "tcg", "-cpu", "max",
        "-smp", str(hardware.cpus), "-m", str(hardware.memory_mb),
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-qmp", f"unix:{FOLDER}/qmp,server=on,wait=off",
        "-device", "virtio-serial-device",
        "-chardev", f"socket,id=port,path={FOLDER}/port,server=on,wait=off",
        "-device", "virtserialport,chardev=port,name=hadal",
        "-device", "virtio-rng-device",
        *(part for disk in disks for part in disk),
        "-kernel", f"{BOOT}/kernel", "-initrd", f"{BOOT}/initrd", "-append", line,
    ]  # fmt: skip

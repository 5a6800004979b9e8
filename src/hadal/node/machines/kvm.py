"""A guest of eleven bytes: whether KVM runs one is known when it has."""

import fcntl
import logging
import mmap
import os
import struct
import subprocess
import sys

from hadal.errors import UnsupportedError

__all__ = ["choose_accelerator", "kvm_fault", "run_guest"]

_LOG = logging.getLogger(__name__)
_TRIAL_S = 10.0

_API_VERSION, _CREATE_VM, _VCPU_SIZE = 0xAE00, 0xAE01, 0xAE04
_SET_MEMORY, _CREATE_VCPU, _RUN = 0x4020AE46, 0xAE41, 0xAE80
_GET_SREGS, _SET_SREGS, _SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
_IO, _HLT = 2, 5
_SUPPORTED_CPUID, _SET_CPUID = 0xC008AE05, 0x4008AE90
_GET_REGISTERS, _SET_REGISTERS = 0xC008AE88, 0x4008AE89
_ARCH_CAPABILITIES = 0x10A
_REASONS = {
    0: "unknown",
    1: "exception",
    8: "shutdown",
    9: "the entry failed",
    17: "internal error",
}
_AT = 0x1000
_PORT = 0x3F8
# mov dx, 0x3f8; mov al, 40; add al, 2; out dx, al; hlt
_CODE = bytes.fromhex("baf803 b028 0402 ee f4")


def choose_accelerator(wanted: str) -> str:
    """Return "kvm" or "tcg"; where "auto" was wanted, what works here, and why in the log.

    Raises:
        UnsupportedError: KVM was wanted, and runs no guest here.
    """
    if wanted == "tcg":
        return wanted
    fault = kvm_fault()
    if fault is None:
        return "kvm"
    if wanted == "kvm":
        raise UnsupportedError(
            f"KVM runs no guest here: {fault}",
            hint="start the node with --accelerator tcg, and without --microvm firecracker",
        )
    _LOG.info("virtual machines are emulated: KVM runs no guest here: %s", fault)
    return "tcg"


def kvm_fault() -> str | None:
    """Return why KVM runs no guest here; None where it has run one, in a process of its own."""
    call = [sys.executable, "-m", __spec__.name]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=_TRIAL_S, check=False)
    except subprocess.TimeoutExpired:
        return f"a tiny guest does not end in {_TRIAL_S:.0f} s"
    return None if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


def run_guest() -> str:
    """Run a few instructions in real mode, until an output and `hlt`.

    Raises:
        OSError: The device, a step, or the guest fails.
    """
    system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(system, _API_VERSION)
    machine = fcntl.ioctl(system, _CREATE_VM, 0)
    memory = mmap.mmap(-1, 0x2000)
    memory[_AT : _AT + len(_CODE)] = _CODE
    region = struct.pack("IIQQQ", 0, 0, 0, len(memory), _address(memory))
    fcntl.ioctl(machine, _SET_MEMORY, region)
    processor = fcntl.ioctl(machine, _CREATE_VCPU, 0)
    run = mmap.mmap(processor, fcntl.ioctl(system, _VCPU_SIZE))
    special = bytearray(312)
    fcntl.ioctl(processor, _GET_SREGS, special)
    struct.pack_into("Q", special, 0, 0)  # base of the code segment
    struct.pack_into("H", special, 12, 0)  # its selector
    fcntl.ioctl(processor, _SET_SREGS, bytes(special))
    # sixteen registers, then rip and rflags
    fcntl.ioctl(processor, _SET_REGS, struct.pack("18Q", *[0] * 16, _AT, 2))
    written = _run_until_io(processor, run)
    if written != (_PORT, 42):
        raise OSError(f"the guest wrote {written}, expected {(_PORT, 42)}")
    fcntl.ioctl(processor, _RUN, 0)
    _expect(run, _HLT)
    _set_features(system, fcntl.ioctl(machine, _CREATE_VCPU, 1))
    return f"API {version}; a guest computed, wrote to a port, and halted"


def _set_features(system: int, processor: int) -> None:
    """Set what every virtual machine monitor sets before it boots a kernel: some nested hosts refuse it."""
    features = bytearray(8 + 40 * 256)
    struct.pack_into("I", features, 0, 256)
    fcntl.ioctl(system, _SUPPORTED_CPUID, features)
    fcntl.ioctl(processor, _SET_CPUID, features)
    register = bytearray(struct.pack("IIIIQ", 1, 0, _ARCH_CAPABILITIES, 0, 0))
    if fcntl.ioctl(system, _GET_REGISTERS, register) != 1:
        return  # this processor has none
    if fcntl.ioctl(processor, _SET_REGISTERS, register) != 1:
        raise OSError(
            f"a tiny guest runs, but KVM refuses its own value of register {_ARCH_CAPABILITIES:#x}, so"
            " that QEMU aborts: a nested host"
        )


def _run_until_io(processor: int, run: mmap.mmap) -> tuple[int, int]:
    fcntl.ioctl(processor, _RUN, 0)
    _expect(run, _IO)
    port, offset = struct.unpack_from("H", run, 34)[0], struct.unpack_from("Q", run, 40)[0]
    return port, run[offset]


def _expect(run: mmap.mmap, reason: int) -> None:
    found = struct.unpack_from("I", run, 8)[0]
    if found != reason:
        raise OSError(f"the guest stopped with exit reason {found} ({_REASONS.get(found, '?')})")


def _address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


if __name__ == "__main__":
    try:
        run_guest()
    except OSError as error:
        sys.exit(str(error))

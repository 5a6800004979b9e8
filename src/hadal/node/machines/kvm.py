"""Two guests of a few bytes: whether KVM runs any is known when it has.

The second one takes a processor of today. Nested hosts may have a KVM that interprets every instruction of a guest that was
not made for it (PVM): the first guest then ends, and a kernel takes minutes, or an instruction that the interpreter has not got.
"""

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
# mov eax, 21; cvtsi2sd xmm0, eax; addsd xmm0, xmm0; cvttsd2si eax, xmm0; mov edx, 0x3f8; out dx, al; hlt
_LONG_CODE = bytes.fromhex("b815000000 f20f2ac0 f20f58c0 f20f2cc0 baf8030000 ee f4")
_TABLES, _DESCRIPTORS = (0x2000, 0x3000, 0x4000), 0x5000
_DATA, _CODE_64 = 0x00CF93000000FFFF, 0x00AF9B000000FFFF


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
    """Run a few instructions in real mode, until an output and `hlt`, and a few in long mode.

    Raises:
        OSError: The device, a step, or the guest fails.
    """
    system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(system, _API_VERSION)
    processor, run, _memory = _machine(system, _CODE)
    special = bytearray(312)
    fcntl.ioctl(processor, _GET_SREGS, special)
    struct.pack_into("Q", special, 0, 0)  # base of the code segment
    struct.pack_into("H", special, 12, 0)  # its selector
    fcntl.ioctl(processor, _SET_SREGS, bytes(special))
    _run_to_the_end(processor, run)
    _run_long_mode(system)
    return f"API {version}; guests computed in real and in long mode, wrote to a port, and halted"


def _machine(system: int, code: bytes) -> tuple[int, mmap.mmap, mmap.mmap]:
    """Return a processor, what it says when it stops, and its memory, with code where it will begin."""
    machine = fcntl.ioctl(system, _CREATE_VM, 0)
    memory = mmap.mmap(-1, 0x200000)
    memory[_AT : _AT + len(code)] = code
    region = struct.pack("IIQQQ", 0, 0, 0, len(memory), _address(memory))
    fcntl.ioctl(machine, _SET_MEMORY, region)
    processor = fcntl.ioctl(machine, _CREATE_VCPU, 0)
    return processor, mmap.mmap(processor, fcntl.ioctl(system, _VCPU_SIZE)), memory


def _run_to_the_end(processor: int, run: mmap.mmap) -> None:
    # sixteen registers, then rip and rflags
    fcntl.ioctl(processor, _SET_REGS, struct.pack("18Q", *[0] * 16, _AT, 2))
    written = _run_until_io(processor, run)
    if written != (_PORT, 42):
        raise OSError(f"the guest wrote {written}, expected {(_PORT, 42)}")
    fcntl.ioctl(processor, _RUN, 0)
    _expect(run, _HLT)


def _run_long_mode(system: int) -> None:
    """Compute with floating point in 64 bits, with paging, as every kernel does."""
    processor, run, memory = _machine(system, _LONG_CODE)
    _set_features(system, processor)
    for table, entry in zip(_TABLES, (_TABLES[1] | 3, _TABLES[2] | 3, 0x83), strict=True):
        struct.pack_into("Q", memory, table, entry)  # the last one: 2 MiB as they are
    struct.pack_into("3Q", memory, _DESCRIPTORS, 0, _CODE_64, _DATA)
    special = bytearray(312)
    fcntl.ioctl(processor, _GET_SREGS, special)
    _put_segment(special, 0, 8, kind=11, wide=True)
    for n in range(1, 6):
        _put_segment(special, n, 16, kind=3, wide=False)
    struct.pack_into("QH", special, 192, _DESCRIPTORS, 23)
    # cr0: protection, numbers, paging; cr3; cr4: wide tables, SSE; efer: long mode
    struct.pack_into("Q", special, 224, 0x80000013)
    struct.pack_into("QQ", special, 240, _TABLES[0], 0x620)
    struct.pack_into("Q", special, 264, 0x500)
    fcntl.ioctl(processor, _SET_SREGS, bytes(special))
    try:
        _run_to_the_end(processor, run)
    except OSError as error:
        raise OSError(
            f"a guest runs in real mode, and not in long mode ({error}): a nested host that"
            " interprets what it cannot run"
        ) from error


def _put_segment(special: bytearray, number: int, selector: int, *, kind: int, wide: bool) -> None:
    """Write a flat segment: base, limit, selector, and the fields of its descriptor."""
    fields = (0, 0xFFFFFFFF, selector, kind, 1, 0, not wide, 1, wide, 1, 0, 0)
    struct.pack_into("QIH9B", special, 24 * number, *fields)


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

"""What the machines of a node run on: the accelerator, and the program."""

from dataclasses import dataclass, replace

from hadal.errors import ConfigError
from hadal.node.machines.firecracker.hypervisor import MODULES, firecracker_program
from hadal.node.machines.kvm import choose_accelerator
from hadal.node.machines.qemu import qemu_program

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """What the operator has chosen.

    Attributes:
        accelerator: "kvm", "tcg", or "auto".
        microvm: The program that runs microVMs: "qemu" or "firecracker".
    """

    accelerator: str
    microvm: str

    def made(self) -> "Choice":
        """Return it with an accelerator that works here.

        Raises:
            ConfigError: Firecracker is to be emulated.
            UnsupportedError: What was chosen does not.
        """
        if self.microvm == "firecracker" and self.accelerator == "tcg":
            raise ConfigError(
                "Firecracker needs KVM, and this node is to emulate",
                hint="leave out --accelerator tcg, or --microvm firecracker",
            )
        chosen = choose_accelerator("kvm" if self.microvm == "firecracker" else self.accelerator)
        return replace(self, accelerator=chosen)

    def of(self, backend: str) -> tuple[str, str, tuple[str, ...]]:
        """Return hypervisor, its program, and the modules that its machines need beside those of all.

        Args:
            backend: "microvm" or "vm".

        Raises:
            UnsupportedError: It is not installed.
        """
        if backend == "microvm" and self.microvm == "firecracker":
            return "firecracker", firecracker_program(), MODULES
        return "qemu", qemu_program(), ()

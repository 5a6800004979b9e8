"""What a caller may ask of a box, before it exists: one class for each backend, on a common base."""

import enum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from hadal.errors import ConfigError
from hadal.sandbox.network_policy import NetworkPolicy

__all__ = [
    "DISK_IMAGE",
    "Capability",
    "ContainerSpec",
    "Firmware",
    "FunctionSpec",
    "GuestProgram",
    "MachineSpec",
    "MicroVMSpec",
    "Mount",
    "Spec",
    "VMSpec",
    "read_spec",
]


def _read_policy(data: object) -> NetworkPolicy:
    if isinstance(data, NetworkPolicy):
        return data
    try:
        return NetworkPolicy.from_json(data)
    except ConfigError as error:
        raise ValueError(str(error)) from error


Network = Annotated[
    NetworkPolicy,
    PlainValidator(_read_policy),
    PlainSerializer(NetworkPolicy.to_json),
    WithJsonSchema({"type": ["object", "string"]}),
]
DISK_IMAGE = "disk@"
"""How references of disk images begin."""
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Firmware = Literal["bios", "uefi"]
GuestProgram = Literal["installed", "cloud-init", "none"]
"""How a system comes to the program that commands run through."""


class Capability(enum.StrEnum):
    """What a backend can do; asking for what it cannot is an `UnsupportedError`."""

    FORK = "fork"
    SNAPSHOT_DISK = "snapshot_disk"
    SNAPSHOT_FULL = "snapshot_full"
    PAUSE = "pause"
    TTY = "tty"
    NETWORK = "network"
    CALL = "call"
    COMMANDS = "commands"
    DISK = "disk"
    SCREEN = "screen"


_BY_THE_GUEST = frozenset(
    {Capability.COMMANDS, Capability.DISK, Capability.NETWORK, Capability.TTY}
)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Mount(_Strict):
    """A directory or file of the node in a box.

    Attributes:
        source: Path on the node.
        target: Absolute path in the box.
        read_only: Whether the box cannot write it.
    """

    source: str = Field(pattern=r"^/[^\x00]*$")
    target: str = Field(pattern=r"^/[^\x00]*$")
    read_only: bool = True


class BoxSpec(_Strict):
    """What every kind of box has.

    Attributes:
        image: A name in the node's store, an OCI reference, a directory on the node, or `host`: this
            node's own /usr, with nothing to fetch. Of a whole machine also a disk image, `disk@NAME`.
        from_: A snapshot to start from, instead of an image; of a machine that was kept whole, it goes on with what
            runs in it.
        cpus: Processors that it may use, in parts of one.
        memory_mb: MiB of memory; beyond it commands end with `oom_killed`.
        disk_mb: MiB that it may write.
        inodes: Files that it may make.
        pids: Processes and threads.
        nofile: Open files of each process.
        shm_mb: MiB of /dev/shm, out of its memory.
        ttl_s: Its life in seconds, at most; then it is gone with cause `ttl`.
        idle_s: Seconds without a request after which it is gone with cause `idle`.
        pause_s: Seconds without a request after which it is paused and its memory given back, until the next one.
            Default: never.
        env: Variables of every command.
        working_dir: Where commands start. Default: what the image says.
        user: Who runs them. Default: what the image says.
        mounts: Of the node's file system.
        read_only: Whether its root cannot be written.
        network: What it may reach. Default: nothing, it has loopback only.
        labels: Names of the caller's own.
    """

    image: str = "host"
    from_: str | None = Field(default=None, alias="from")
    cpus: float = Field(default=1.0, gt=0, le=4096)
    memory_mb: int = Field(default=1024, ge=16, le=1 << 26)
    disk_mb: int = Field(default=4096, ge=1, le=1 << 24)
    inodes: int = Field(default=250_000, ge=64, le=1 << 31)
    pids: int = Field(default=4096, ge=8, le=4_000_000)
    nofile: int = Field(default=4096, ge=16, le=1 << 20)
    shm_mb: int = Field(default=64, ge=1, le=1 << 26)
    ttl_s: Seconds = 86400.0
    idle_s: Seconds = 7200.0
    pause_s: Seconds | None = None
    env: dict[str, str] = Field(default_factory=dict)
    working_dir: str | None = None
    user: str | None = None
    mounts: tuple[Mount, ...] = ()
    read_only: bool = False
    network: Network = Field(default_factory=NetworkPolicy.none)
    labels: dict[str, str] = Field(default_factory=dict)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def root(self) -> str:
        """What its root is made of."""
        return self.from_ or self.image

    @property
    def can(self) -> frozenset[Capability]:
        """What it can do: as a rule what all boxes of its backend can."""
        return getattr(self, "capabilities", frozenset())

    @model_validator(mode="after")
    def _boots_no_disk(self) -> Self:
        if self.root.startswith(DISK_IMAGE) and getattr(self, "backend", "") != "vm":
            raise ValueError(f"{self.root} is a disk that a whole machine boots from: backend vm")
        return self


class ContainerSpec(BoxSpec):
    """A container: namespaces, cgroups and a filter of system calls on the node's kernel."""

    backend: Literal["container"] = "container"

    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {
            Capability.COMMANDS,
            Capability.DISK,
            Capability.FORK,
            Capability.NETWORK,
            Capability.PAUSE,
            Capability.SNAPSHOT_DISK,
            Capability.TTY,
        }
    )


class FunctionSpec(BoxSpec):
    """Calls of a function in warm interpreters; see `Sandbox.call`.

    Attributes:
        python: The interpreter in the image.
        preload: Modules that are imported before the first call.
        spare: Boxes that are kept ready for calls that want one that nobody has used.
    """

    backend: Literal["function"] = "function"
    python: str = "python3"
    preload: tuple[str, ...] = ()
    spare: int = Field(default=0, ge=0, le=1024)

    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.CALL, Capability.COMMANDS, Capability.PAUSE, Capability.TTY}
    )


class _MachineSpec(BoxSpec):
    """What virtual machines have in common: a kernel of their own.

    Attributes:
        memory_mb: MiB of its memory, that of its kernel included.
        spare: Machines like it that are kept started for whoever asks for one, five minutes each; they count as
            boxes of the node.
    """

    memory_mb: int = Field(default=256, ge=96, le=1 << 21)
    spare: int = Field(default=0, ge=0, le=1024)

    capabilities: ClassVar[frozenset[Capability]] = ContainerSpec.capabilities | {
        Capability.SNAPSHOT_FULL
    }

    @model_validator(mode="after")
    def _has_nothing_of_the_node(self) -> Self:
        if self.mounts:
            raise ValueError("a machine has no mounts of the node's files: copy them in")
        if self.read_only:
            raise ValueError("the root of a machine can always be written")
        return self


class MicroVMSpec(_MachineSpec):
    """A small virtual machine: the node's kernel, with the image's layers as disks."""

    backend: Literal["microvm"] = "microvm"


class VMSpec(_MachineSpec):
    """A whole PC, with firmware, PCI, a screen, a keyboard and a pointer.

    It has the node's kernel and the layers of an image, as a microVM has; or it boots a disk image, whose system
    says itself how large it is and how much may run in it.

    Attributes:
        firmware: That a disk image boots by. Default: as was said when it was added.
        guest: How a disk image comes to the guest program, through which commands run: it is installed; cloud-init
            installs it at the first boot; or there is none, and the machine has its screen, keyboard, mouse and serial
            console alone. Default: as was said when it was added.
    """

    backend: Literal["vm"] = "vm"
    firmware: Firmware | None = None
    guest: GuestProgram | None = None

    capabilities: ClassVar[frozenset[Capability]] = _MachineSpec.capabilities | {Capability.SCREEN}

    @property
    def can(self) -> frozenset[Capability]:
        """Without the guest program only what is done from outside."""
        return self.capabilities - _BY_THE_GUEST if self.guest == "none" else self.capabilities

    @model_validator(mode="after")
    def _leaves_it_to_the_system(self) -> Self:
        fields = type(self).model_fields
        if self.root.startswith(DISK_IMAGE):
            for name in ("disk_mb", "inodes", "pids", "shm_mb"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name}: what {self.root} has of it, the system in it says")
        elif self.from_ is None and (self.firmware is not None or self.guest is not None):
            raise ValueError(f"firmware and guest are those of a disk image: {self.root} is none")
        if self.guest == "none" and (self.spare or self.network.default != "none"):
            raise ValueError(
                "without a guest program there are no spares, and nobody to tell its address"
            )
        return self


MachineSpec = MicroVMSpec | VMSpec
Spec = ContainerSpec | FunctionSpec | MachineSpec
_ADAPTER: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="backend")])


def read_spec(data: dict[str, Any]) -> Spec:
    """Read a spec from JSON.

    Raises:
        ConfigError: A field is unknown, missing or out of its range.
    """
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"box spec: {where}: {first['msg']}, got {first['input']!r:.500}"
        ) from error

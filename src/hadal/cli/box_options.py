"""What `hadal box create` can ask of a box."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from hadal.cli.quantities import parse_bytes, parse_seconds, read_pairs
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.sandbox.specs import Spec

__all__ = ["BoxOptions", "absolute_image"]

_Bytes = Annotated[int | None, Parameter(converter=parse_bytes)]
_Seconds = Annotated[float | None, Parameter(converter=parse_seconds)]
_Many = Annotated[tuple[str, ...], Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BoxOptions:
    """What a box has.

    Attributes:
        backend: container, or a machine with a kernel of its own: microvm, or vm, a whole PC.
        cpus: Processors that it may use, in parts of one.
        memory: That it may use, as 512MiB; beyond it commands are killed.
        disk: That it may write.
        pids: Processes and threads.
        ttl: Its life, at most, as 2h.
        idle: Time without use after which it ends.
        pause_after: Time without use after which it is paused and its memory given back, until it is used again.
        env: NAME=VALUE for every command; can be repeated.
        mount: SOURCE:TARGET[:rw] of the node's files; can be repeated.
        working_dir: Where commands start. Default: what the image says.
        network: What it may reach: none (only itself), deny (what --allow names), allow (the public
            internet). Default: none, or deny with --allow.
        allow: What it may reach beside that: a network, a host, HOST:PORT, or a service such as pypi.
        deny: What it may not reach in any case.
        label: NAME=VALUE of your own; can be repeated.
        spare: Machines like it that are kept started for whoever asks for one.
        firmware: That a disk boots by. Default: as was said when it was added.
        guest: How the system of a disk comes to the guest program. Default: as was said when it was added.
    """

    backend: Literal["container", "microvm", "vm"] = "container"
    cpus: float | None = None
    memory: _Bytes = None
    disk: _Bytes = None
    pids: int | None = None
    ttl: _Seconds = None
    idle: _Seconds = None
    pause_after: _Seconds = None
    env: _Many = ()
    mount: _Many = ()
    working_dir: str | None = None
    network: Literal["none", "deny", "allow"] | None = None
    allow: _Many = ()
    deny: _Many = ()
    label: _Many = ()
    spare: int | None = None
    firmware: Literal["bios", "uefi"] | None = None
    guest: Literal["installed", "cloud-init", "none"] | None = None

    def spec(self, image: str) -> "Spec":
        """Return a box of this image.

        Raises:
            ConfigError: Something is out of its range, or does not fit the rest.
        """
        from hadal.sandbox.specs import read_spec

        fields: dict[str, Any] = {
            "from" if image.startswith("machine@") else "image": absolute_image(image),
            "cpus": self.cpus,
            "memory_mb": _mib("--memory", self.memory),
            "disk_mb": _mib("--disk", self.disk),
            "pids": self.pids,
            "ttl_s": self.ttl,
            "idle_s": self.idle,
            "pause_s": self.pause_after,
            "env": read_pairs("--env", self.env),
            "mounts": [_mount(text) for text in self.mount],
            "working_dir": self.working_dir,
            "network": self._network(),
            "labels": read_pairs("--label", self.label),
            "backend": self.backend,
            "spare": self.spare,
            "firmware": self.firmware,
            "guest": self.guest,
        }
        return read_spec({name: value for name, value in fields.items() if value is not None})

    def anywhere(self) -> "BoxOptions":
        """Return options that mean the same in another working directory."""
        return replace(self, mount=tuple(_absolute(text) for text in self.mount))

    def _network(self) -> dict[str, Any] | None:
        if self.network is None and not self.allow and not self.deny:
            return None
        return {
            "default": self.network or "deny",
            "allow": list(self.allow),
            "deny": list(self.deny),
        }


def absolute_image(text: str) -> str:
    """Return the name of an image, or its folder's whole path."""
    return str(Path(text).resolve()) if text.startswith(("./", "../")) or text == "." else text


def _mib(option: str, size: int | None) -> int | None:
    if size is not None and size < 1 << 20:
        raise ConfigError(f"{option}: expected at least 1MiB, got {size} bytes")
    return None if size is None else size >> 20


def _absolute(mount: str) -> str:
    source, separator, rest = mount.partition(":")
    return absolute_image(source) + separator + rest


def _mount(text: str) -> dict[str, Any]:
    source, _, rest = text.partition(":")
    target, _, how = rest.partition(":")
    if not target or how not in ("", "ro", "rw"):
        raise ConfigError(f"--mount: expected SOURCE:TARGET or SOURCE:TARGET:rw, got {text!r:.200}")
    return {"source": absolute_image(source), "target": target, "read_only": how != "rw"}

"""What a box may reach, as a caller says it: pure data, enforced by the node (docs/network.md).

    NetworkPolicy(default="deny", allow=("pypi", "github.com:443", "*.debian.org", "192.0.2.0/24:5432/tcp"))

An entry is an address or network, a domain, or the name of a service that the node knows. A denied
entry wins over an allowed one, and both win over the default.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any, Literal, NoReturn, cast

from hadal.errors import ConfigError

__all__ = [
    "AddressEntry",
    "DomainEntry",
    "Entry",
    "NetworkPolicy",
    "Protocol",
    "ServiceEntry",
    "parse_entry",
]

Protocol = Literal["tcp", "udp"]
_ENTRIES_MAX = 256
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_DOMAIN = re.compile(rf"(?P<star>\*\.)?(?P<name>{_LABEL}(?:\.{_LABEL})*)(?P<root>\.?)")
_SERVICE = re.compile(r"[a-z][a-z0-9-]{0,62}")
_ADDRESS = re.compile(r"[0-9.]+(/[0-9]+)?")
_GRAMMAR = (
    "write 192.0.2.0/24, 192.0.2.1:443, 192.0.2.1:8000-8999/tcp, example.org, *.example.org:443, "
    "or the name of a service such as github"
)


@dataclass(frozen=True, slots=True)
class AddressEntry:
    """Addresses, and which of their ports.

    Attributes:
        network: The addresses.
        ports: First and last port; None for everything, whether it has ports or not.
        protocol: None for both.
    """

    network: IPv4Network
    ports: tuple[int, int] | None = None
    protocol: Protocol | None = None


@dataclass(frozen=True, slots=True)
class DomainEntry:
    """A domain, or all domains below one.

    Attributes:
        name: In lower case, without a dot at its end.
        below: Whether the entry is for all names below it, at any depth, and not for itself.
        port: None for everything, whether it has ports or not.
        protocol: None for both.
    """

    name: str
    below: bool = False
    port: int | None = None
    protocol: Protocol | None = None


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """A service by name; what that is, the configuration of the node says.

    Attributes:
        name: As `pypi`.
    """

    name: str


Entry = AddressEntry | DomainEntry | ServiceEntry


@dataclass(frozen=True)
class NetworkPolicy:
    """What a box may reach.

    Attributes:
        default: What happens to what no entry names: `deny`; `allow`, which is the public internet, so
            that private addresses must be named all the same; or `none`: the box has loopback only,
            for good, where the others can be changed while it runs.
        allow: What is allowed beside that.
        deny: What is denied in any case.

    Raises:
        ConfigError: An entry is not one, or does not fit the others.
    """

    default: Literal["none", "deny", "allow"] = "deny"
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.default not in ("none", "deny", "allow"):
            raise ConfigError(
                f"network policy: default: expected none, deny or allow, got {self.default!r}"
            )
        for field in ("allow", "deny"):
            entries = getattr(self, field)
            if isinstance(entries, str) or not all(isinstance(e, str) for e in entries):
                raise ConfigError(
                    f"network policy: {field}: expected a list of texts, got {entries!r}"
                )
            if len(entries) > _ENTRIES_MAX:
                raise ConfigError(
                    f"network policy: {field}: expected at most {_ENTRIES_MAX} entries, got {len(entries)}",
                    hint="join neighbouring addresses to networks",
                )
            if entries and self.default == "none":
                raise ConfigError(
                    f"network policy: a box without a network cannot {field} {entries[0]!r}",
                    hint='use default="deny"',
                )
            object.__setattr__(self, field, tuple(entries))
        self.allowed_entries()
        self.denied_entries()

    @classmethod
    def none(cls) -> "NetworkPolicy":
        """Return the policy of a box with loopback only, which cannot be changed later."""
        return cls(default="none")

    @classmethod
    def open(cls) -> "NetworkPolicy":
        """Return the policy that allows the public internet; not private addresses, not the node."""
        return cls(default="allow")

    def allowed_entries(self) -> list[Entry]:
        """Return `allow` as data."""
        return [parse_entry(text) for text in self.allow]

    def denied_entries(self) -> list[Entry]:
        """Return `deny` as data."""
        entries = [parse_entry(text) for text in self.deny]
        for text, entry in zip(self.deny, entries, strict=True):
            if isinstance(entry, DomainEntry) and (entry.port or entry.protocol):
                raise ConfigError(
                    f"network policy: deny: {text!r}: a domain is denied as a whole, by not answering"
                    " for its name; it takes no port",
                    hint="deny the domain, or deny addresses with a port",
                )
        return entries

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON; `from_json` reads it."""
        return {"default": self.default, "allow": list(self.allow), "deny": list(self.deny)}

    @classmethod
    def from_json(cls, data: object) -> "NetworkPolicy":
        """Read a policy from JSON: an object, or the name of a preset, `none`, `deny` or `open`.

        Raises:
            ConfigError: A field is unknown, or what it says is wrong.
        """
        presets: dict[str, Callable[[], NetworkPolicy]] = {
            "none": cls.none,
            "deny": cls,
            "open": cls.open,
        }
        if isinstance(data, str) and data in presets:
            return presets[data]()
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"network policy: expected an object, none, deny or open, got {data!r}"
            )
        fields = cast(Mapping[str, Any], data)
        if unknown := set(fields) - {"default", "allow", "deny"}:
            raise ConfigError(
                f"network policy: expected default, allow and deny, got {min(unknown)!r}"
            )
        for name in ("allow", "deny"):
            if not isinstance(fields.get(name, []), list | tuple):
                raise ConfigError(f"network policy: {name}: expected a list, got {fields[name]!r}")
        return cls(**fields)


def parse_entry(text: str) -> Entry:
    """Read one entry.

    Raises:
        ConfigError: It is not one; says why.
    """

    def refuse(why: str, hint: str = _GRAMMAR) -> NoReturn:
        raise ConfigError(f"network policy: {text!r}: {why}", hint=hint)

    rest, slash, suffix = text.strip().lower().rpartition("/")
    protocol: Protocol | None = None
    if slash and suffix in ("tcp", "udp"):
        protocol = suffix
    else:
        rest = text.strip().lower()
    if "://" in rest:
        refuse("a URL, where a host is expected")
    if rest.count(":") > 1 or "[" in rest:
        refuse("boxes have no IPv6", "leave the entry out; names are answered with IPv4 addresses")
    host, colon, port_text = rest.partition(":")
    if "/" in port_text:
        refuse(f"expected /tcp or /udp at the end, got {port_text.partition('/')[2]!r}")
    ports = _parse_ports(port_text, refuse) if colon else None
    if protocol and ports is None:
        refuse(
            f"{protocol} without a port", f"write {host}:1-65535/{protocol} for all of its ports"
        )
    if _ADDRESS.fullmatch(host):
        return AddressEntry(_parse_network(host, refuse), ports, protocol)
    if _SERVICE.fullmatch(host):
        if colon:
            refuse("a service takes no port", f"a domain of one word ends with a dot: {host}.:443")
        return ServiceEntry(host)
    found = _DOMAIN.fullmatch(host)
    if found is None or len(host) > 253:
        refuse("neither an IPv4 address, nor a domain, nor a service")
    if found["name"].rpartition(".")[2].isdigit():
        refuse("neither an IPv4 address nor a domain")
    if ports is not None and ports[0] != ports[1]:
        refuse("a domain takes one port", "write an entry for each port, or leave the ports out")
    return DomainEntry(
        found["name"], found["star"] is not None, ports[0] if ports else None, protocol
    )


def _parse_ports(text: str, refuse: Callable[[str], NoReturn]) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        refuse(f"expected a port or two with a dash, got {text!r}")
    low, high = int(first), int(last) if dash else int(first)
    if not 0 < low <= high < 65536:
        refuse(f"expected ports from 1 to 65535 in order, got {text!r}")
    return low, high


def _parse_network(text: str, refuse: Callable[[str, str], NoReturn]) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError as error:
        try:
            meant = IPv4Network(text, strict=False)
        except ValueError:
            refuse(f"not an IPv4 network: {error}", _GRAMMAR)
        refuse("the address has bits beyond its prefix", f"write {meant}")

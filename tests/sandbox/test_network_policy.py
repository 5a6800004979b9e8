"""What may be reached, as text and as data."""

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.errors import ConfigError
from hadal.node.network.rules import NEVER, compile_policy
from hadal.node.network.services import SERVICES
from hadal.sandbox.network_policy import (
    AddressEntry,
    DomainEntry,
    NetworkPolicy,
    ServiceEntry,
    parse_entry,
)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("192.0.2.1", AddressEntry(IPv4Network("192.0.2.1"))),
        ("192.0.2.0/24", AddressEntry(IPv4Network("192.0.2.0/24"))),
        ("0.0.0.0/0:443/tcp", AddressEntry(IPv4Network("0.0.0.0/0"), (443, 443), "tcp")),
        ("10.0.0.0/8:5432", AddressEntry(IPv4Network("10.0.0.0/8"), (5432, 5432))),
        ("10.0.0.1:8000-8999/udp", AddressEntry(IPv4Network("10.0.0.1"), (8000, 8999), "udp")),
        ("github.com:443", DomainEntry("github.com", port=443)),
        ("GitHub.com.", DomainEntry("github.com")),
        ("*.github.com", DomainEntry("github.com", below=True)),
        ("*.x-y.test:53/udp", DomainEntry("x-y.test", True, 53, "udp")),
        ("_srv._tcp.test", DomainEntry("_srv._tcp.test")),
        ("registry.:5000", DomainEntry("registry", port=5000)),
        ("pypi", ServiceEntry("pypi")),
        (" npm ", ServiceEntry("npm")),
    ],
)
def test_entries(text, entry):
    assert parse_entry(text) == entry


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither"),
        ("10.0.0.1/8", "beyond its prefix\nhint: write 10.0.0.0/8"),
        ("10.0.0.256", "not an IPv4 network"),
        ("10.0.0.0/33", "not an IPv4 network"),
        ("10.0.0.1:0", "ports from 1 to 65535"),
        ("10.0.0.1:9-8", "in order"),
        ("10.0.0.1:65536", "65535"),
        ("10.0.0.1:x", "expected a port or two"),
        ("10.0.0.1:1-", "expected a port or two"),
        ("10.0.0.1/tcp", "tcp without a port"),
        ("10.0.0.1:80/icmp", "expected /tcp or /udp"),
        ("::1", "no IPv6"),
        ("[2001:db8::1]:443", "no IPv6"),
        ("pypi:443", "a service takes no port"),
        ("github.com:1-2", "a domain takes one port"),
        ("*", "neither"),
        ("*.*.test", "neither"),
        ("a..test", "neither"),
        ("-a.test", "neither"),
        ("münchen.test", "neither"),
        ("a.test; drop", "neither"),
        ("https://a.test", "a URL"),
        (f"{'a' * 64}.test", "neither"),
        (".".join(["a" * 60] * 5), "neither"),
        ("1.2.3.4.5", "not an IPv4 network"),
        ("a.1", "neither an IPv4 address nor a domain"),
    ],
)
def test_what_is_not_an_entry(text, message):
    with pytest.raises(ConfigError) as found:
        parse_entry(text)
    assert message in str(found.value)
    assert repr(text) in str(found.value)
    assert found.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"default": "reject"}, "expected none, deny or allow"),
        ({"allow": "github.com"}, "expected a list"),
        ({"allow": [1]}, "expected a list of texts"),
        ({"allow": ["10.0.0.1"] * 257}, "at most 256"),
        ({"default": "none", "allow": ["pypi"]}, "without a network cannot allow"),
        ({"deny": ["github.com:22"]}, "denied as a whole"),
        ({"alow": []}, "got 'alow'"),
    ],
)
def test_what_is_not_a_policy(fields, message):
    with pytest.raises(ConfigError, match=message):
        NetworkPolicy.from_json(fields)


def test_json():
    policy = NetworkPolicy(allow=("pypi", "10.0.0.0/8:80"), deny=("evil.test",))
    assert NetworkPolicy.from_json(policy.to_json()) == policy
    assert NetworkPolicy.from_json("open") == NetworkPolicy.open()
    assert NetworkPolicy.from_json("none") == NetworkPolicy.none()
    assert NetworkPolicy.from_json("deny") == NetworkPolicy()
    with pytest.raises(ConfigError, match="got 7"):
        NetworkPolicy.from_json(7)


@given(st.text(max_size=40))
def test_any_text_is_an_entry_or_a_named_error(text):
    try:
        entry = parse_entry(text)
    except ConfigError:
        return
    # What reaches the filter as text is made of a network, numbers and known words only.
    assert isinstance(entry, AddressEntry | DomainEntry | ServiceEntry)


def test_services_are_replaced():
    rules = compile_policy(NetworkPolicy(allow=("github", "10.0.0.0/8"), deny=("npm",)), SERVICES)
    assert rules.is_allowed("github.com")
    assert rules.is_allowed("a.b.github.com")
    assert not rules.is_allowed("github.com.evil.test")
    assert not rules.is_allowed("xgithub.com")
    assert rules.ports("github.com") == {(443, "tcp"), (443, "udp")}
    assert rules.is_denied("any.npmjs.org")
    services = {"mirror": ("mirror.test:443", "10.1.2.0/24:443"), "loop": ("mirror",)}
    rules = compile_policy(NetworkPolicy(allow=("mirror",)), services)
    assert rules.may_answer(IPv4Address("10.1.2.3"), NEVER)
    with pytest.raises(ConfigError, match="expected domains and addresses"):
        compile_policy(NetworkPolicy(allow=("loop",)), services)


@pytest.mark.parametrize("name", [name for name, entries in SERVICES.items() if entries])
def test_the_services_are_entries(name):
    assert compile_policy(NetworkPolicy(allow=(name,)), SERVICES).allow_names


def test_names_lead_to_public_addresses_or_named_ones():
    rules = compile_policy(NetworkPolicy(default="allow", allow=("10.0.0.0/16", "127.0.0.1")), {})
    for text, expected in (
        ("203.0.113.1", True),
        ("10.0.3.4", True),
        ("10.1.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
    ):
        assert rules.may_answer(IPv4Address(text), NEVER) is expected, text

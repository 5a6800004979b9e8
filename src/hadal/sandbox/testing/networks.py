"""What a network lets through."""

from hadal.errors import UnsupportedError
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, expect, holds

__all__ = ["no_network", "policy"]

_CONNECT = "import socket; socket.create_connection(('{}', 80), timeout=3)"
_NOWHERE = "198.51.100.1"  # RFC 5737: it is nobody's
_ELSEWHERE = "192.0.2.1"


@check()
def no_network(make: MakeBox) -> None:
    """A box that did not ask for a network has loopback only, and cannot get one later."""
    with make() as box:
        equal(box.run("ls /sys/class/net").stdout.split(), ["lo"])
        tried = box.run(["python3", "-c", _CONNECT.format(_NOWHERE)])
        holds("unreachable" in tried.stderr.lower(), f"it says: {tried.stderr[-200:]}")
        with expect(UnsupportedError):
            box.set_network(NetworkPolicy(default="deny"))


@check(Capability.NETWORK)
def policy(make: MakeBox) -> None:
    """What a policy does not allow is refused at once and remembered; another policy holds from then on."""
    with make(network=NetworkPolicy(default="deny", allow=(f"{_ELSEWHERE}:80",))) as box:
        tried = box.run(["python3", "-c", _CONNECT.format(_NOWHERE)])
        said = tried.stderr.lower()
        holds("refused" in said or "unreachable" in said, f"it says: {tried.stderr[-200:]}")
        holds(_NOWHERE in str(box.network()["denials"]), "it does not remember")
        box.set_network(NetworkPolicy(default="deny"))
        equal(box.log()[-1].kind, "network")
        tried = box.run(["python3", "-c", _CONNECT.format(_ELSEWHERE)])
        holds(_ELSEWHERE in str(box.network()["denials"]), f"it is let out: {tried.stderr[-200:]}")

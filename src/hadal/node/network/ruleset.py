"""The packet filter as text: what stands for good, and one chain for each policy.

Everything that differs between boxes is an element of a set, found by hashing, so that the way of a
packet is as long with 2,000 boxes as with one:

    boxes                who is who: link and address; others are dropped (no spoofing)
    policies             address of a box -> chain of its policy, shared by all with the same one
    epochs, live         what a connection is marked with once its policy let it pass. A change of
                         policy gives the box a new mark: its connections are judged again, in both
                         directions, at their next packet, and those now forbidden are reset
    names, name_ports    addresses that the resolver has given to a box, with a timeout
    sent, received,
    rejected             counters

Chains judge by `ct original`: the connection as its beginner saw it, whatever way a packet goes.
"""

import hashlib
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

from hadal.node.network.rules import PRIVATE, Rules
from hadal.sandbox.network_policy import AddressEntry

__all__ = [
    "REPORT_GROUP",
    "TABLE",
    "UPLINK",
    "chain_name",
    "delete_chain_text",
    "host_ruleset",
    "policy_chain",
    "router_ruleset",
    "version_chain",
]

TABLE = "hadal"
UPLINK = "uplink"
REPORT_GROUP = 1
_DNS = "meta l4proto { tcp, udp } th dport 53"
_BOX = "ct original ip saddr"
_REMOTE = "ct original ip daddr"
_TIMED = "size 65536; flags dynamic; timeout 10m;"
_REFUSE = """meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited"""
_SETS = f"""
  set boxes {{ typeof iifname . ip saddr; }}
  set live {{ type ipv4_addr . mark; }}
  map epochs {{ type ipv4_addr : mark; }}
  map policies {{ type ipv4_addr : verdict; }}
  set names {{ type ipv4_addr . ipv4_addr; flags timeout; }}
  set name_ports {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags timeout; }}
  set sent {{ type ipv4_addr; counter; }}
  set received {{ type ipv4_addr; counter; }}
  set rejected {{ type ipv4_addr; counter; }}
  set question_rate {{ type ipv4_addr; {_TIMED} }}
  set report_rate {{ type ipv4_addr; {_TIMED} }}
  set connections {{ type ipv4_addr; size 65536; flags dynamic; }}
"""


def _networks(networks: Iterable[IPv4Network]) -> str:
    return ", ".join(str(n) for n in networks)


def router_ruleset(
    *,
    boxes: IPv4Network,
    resolver: IPv4Address,
    never: Iterable[IPv4Network],
    questions_per_s: int,
    connections_max: int,
) -> str:
    """Return the table of the router, without any box.

    Args:
        boxes: Their addresses.
        resolver: Where the node answers for names; all questions are led there.
        never: What no policy can allow.
        questions_per_s: Packets to the resolver that a box may send each second.
        connections_max: Connections that a box may have at a time.
    """
    body = f"""{_SETS}
  set private {{ type ipv4_addr; flags interval; elements = {{ {_networks(PRIVATE)} }}; }}
  set never {{ type ipv4_addr; flags interval; elements = {{ {_networks(never)} }}; }}

  chain arrive {{
    type filter hook prerouting priority raw; policy accept;
    iifname lo accept
    iifname {UPLINK} ip saddr {boxes} drop
    iifname {UPLINK} accept
    meta nfproto ipv6 drop
    iifname . ip saddr != @boxes drop
    {_DNS} update @question_rate {{ ip saddr limit rate over {questions_per_s}/second burst {3 * questions_per_s} packets }} drop
  }}
  chain ask {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname != {UPLINK} {_DNS} dnat ip to {resolver}
  }}
  chain leave {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname {UPLINK} masquerade
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname lo accept
    ct state established,related accept
    iifname {UPLINK} drop
    ip daddr {resolver} {_DNS} accept
    goto refuse
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    {_BOX} . ct mark @live goto accepted
    {_REMOTE} @never goto refuse
    {_BOX} vmap @policies
  }}
  chain decided {{
    ct state new add @connections {{ ip saddr ct count over {connections_max} }} goto refuse
    ct mark set {_BOX} map @epochs
    goto accepted
  }}
  chain accepted {{
    iifname {UPLINK} ip daddr @received accept
    ip saddr @sent accept
  }}
  chain refuse {{
    {_BOX} @rejected
    ct direction original update @report_rate {{ {_BOX} limit rate 20/second burst 60 packets }} log group {REPORT_GROUP} snaplen 64
    {_REFUSE}
  }}
"""
    version = hashlib.sha256(body.encode()).hexdigest()[:12]
    return f"table inet {TABLE} {{\n{body}\n  chain version_{version} {{ }}\n}}\n"


def version_chain(ruleset: str) -> str:
    """Return the name of the empty chain by which a running table is recognised as of this text."""
    return next(word for word in ruleset.split() if word.startswith("version_"))


def host_ruleset(name: str, uplink: str, router: IPv4Address) -> str:
    """Return the one table of the host: boxes never reach its own addresses, and leave with one of them.

    Args:
        name: Of the table.
        uplink: The host's link to the router.
        router: The router's address on it, which the router gives to all that boxes send.
    """
    return f"""table inet {name} {{
  chain arrive {{
    type filter hook prerouting priority mangle; policy accept;
    iifname != {uplink} accept
    ip saddr != {router} drop
    meta nfproto ipv6 drop
    fib daddr type local goto refuse
  }}
  chain refuse {{
    {_REFUSE}
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname {uplink} ct state new drop
  }}
  chain leave {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {router} oifname != {uplink} masquerade
  }}
}}
"""


def chain_name(rules: Rules) -> str:
    """Return the name of the chain of a policy; equal rules have the same one."""
    return f"policy_{rules.digest}"


def policy_chain(rules: Rules) -> str:
    """Return the chain of a policy as text."""
    lines = [f"{_match(entry)}goto refuse" for entry in rules.deny]
    lines += [f"{_match(entry)}goto decided" for entry in rules.allow]
    if rules.allow_names:
        lines += [
            f"{_BOX} . {_REMOTE} @names goto decided",
            f"ct direction original {_BOX} . {_REMOTE} . meta l4proto . th dport @name_ports goto decided",
            f"ct direction reply {_BOX} . {_REMOTE} . meta l4proto . th sport @name_ports goto decided",
        ]
    lines += [f"{_REMOTE} @private goto refuse", "goto decided"] if rules.open else ["goto refuse"]
    body = "\n    ".join(lines)
    return f"table inet {TABLE} {{\n  chain {chain_name(rules)} {{\n    {body}\n  }}\n}}\n"


def delete_chain_text(name: str) -> str:
    """Return what deletes a chain."""
    return f"delete chain inet {TABLE} {name}\n"


def _match(entry: AddressEntry) -> str:
    parts: list[str] = []
    if entry.protocol is not None:
        parts.append(f"meta l4proto {entry.protocol}")
    elif entry.ports is not None:
        parts.append("meta l4proto { tcp, udp }")
    if entry.network.prefixlen:
        parts.append(f"{_REMOTE} {entry.network}")
    if entry.ports is not None:
        first, last = entry.ports
        parts.append(f"ct original proto-dst {first}" + (f"-{last}" if last != first else ""))
    return "".join(f"{part} " for part in parts)

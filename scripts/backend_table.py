"""Write docs/backends.md: what each kind of box supports, made from the conformance suite.

    python scripts/backend_table.py [--check]

A check applies to a kind of box that has what the check needs; tests/sandbox/test_conformance.py runs all that
apply, on every kind.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from hadal.sandbox.specs import Capability, Spec
from hadal.sandbox.testing import Check, all_checks

TARGET = Path(__file__).resolve().parents[1] / "docs/backends.md"
BACKENDS = {kind.model_fields["backend"].default: kind.capabilities for kind in get_args(Spec)}
_DASH = "\N{EN DASH}"
HEAD = """\
# What each kind of box supports

Made by `scripts/backend_table.py` from the [conformance suite](../src/hadal/sandbox/testing), all of whose checks
that apply pass on each kind of box ([test](../tests/sandbox/test_conformance.py)). A dash is where asking for it is an
`UnsupportedError`. What the capabilities mean is in [specs.py](../src/hadal/sandbox/specs.py).
"""


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |\n"


def marks(needs: frozenset[Capability]) -> list[str]:
    """Return a mark for every kind of box."""
    return ["yes" if needs <= has else _DASH for has in BACKENDS.values()]


def table(first: tuple[str, ...], rows: list[tuple[tuple[str, ...], frozenset[Capability]]]) -> str:
    """Return a table whose last columns are the kinds of boxes."""
    head = row(*first, *BACKENDS) + row(*["---"] * (len(first) + len(BACKENDS)))
    return head + "".join(row(*cells, *marks(needs)) for cells, needs in rows)


def text() -> str:
    """Return the document."""
    checks = all_checks()

    def count(capability: Capability) -> str:
        return str(sum(capability in check.needs for check in checks))

    commands = (
        Capability.COMMANDS
    )  # no check says so, but for those of other capabilities all need them
    capabilities = [
        ((f"`{one}`", count(one)), frozenset({one})) for one in Capability if one != commands
    ]
    basic = str(sum(not c.needs for c in checks))
    capabilities.insert(
        0, ((f"`{commands}`, and what every box can", basic), frozenset({commands}))
    )
    return f"{HEAD}\n{table(('capability', 'checks'), capabilities)}\n## The checks\n\n" + table(
        ("check", "what holds"), [_described(check) for check in checks]
    )


def _described(check: Check) -> tuple[tuple[str, str], frozenset[Capability]]:
    about = check.about.replace("|", "\\|").rstrip(".")
    return (f"`{check.name}`", about), check.needs


def main() -> int:
    """Write the document, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if it is stale"
    )
    made = text()
    if not parser.parse_args().check:
        TARGET.write_text(made, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == made:
        return 0
    sys.stderr.write("docs/backends.md is stale: run scripts/backend_table.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The list of checks, and the little that they share."""

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from hadal.errors import SandboxError
from hadal.sandbox.specs import Capability
from hadal.sandbox.sync import Sandbox

__all__ = [
    "Caught",
    "Check",
    "CheckFailedError",
    "MakeBox",
    "all_checks",
    "check",
    "equal",
    "expect",
    "holds",
]

_MODULES = ("commands", "streams", "files", "limits", "life", "functions", "networks", "screens")
_checks: list["Check"] = []


class CheckFailedError(SandboxError):
    """A backend does not do what it must."""

    code = "check_failed"


class MakeBox(Protocol):
    """Makes a box of the backend, with these changes to its spec."""

    def __call__(self, **changes: Any) -> Sandbox:
        """Make one; `trajectory` is passed on to `Sandbox.create`."""
        ...


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name, as `commands.exit_codes`.
        about: What a backend must do, in a line.
        needs: Capabilities without which it does not apply.
        slow: Whether it takes more than a few seconds.
        run: Runs it; raises `CheckFailedError`, or whatever went wrong.
    """

    name: str
    about: str
    needs: frozenset[Capability]
    slow: bool
    run: Callable[[MakeBox], None]


def check(
    *needs: Capability, slow: bool = False
) -> Callable[[Callable[[MakeBox], None]], Callable[[MakeBox], None]]:
    """Register a function as a check."""

    def register(function: Callable[[MakeBox], None]) -> Callable[[MakeBox], None]:
        module = function.__module__.rpartition(".")[2]
        about = (function.__doc__ or "").splitlines()[0]
        name = f"{module}.{function.__name__}"
        _checks.append(Check(name, about, frozenset(needs), slow, function))
        return function

    return register


def all_checks() -> list[Check]:
    """Return every check, in the order in which they are written."""
    for module in _MODULES:
        importlib.import_module(f"hadal.sandbox.testing.{module}")
    return list(_checks)


def equal(found: object, expected: object, what: str = "") -> None:
    """Fail where two values differ."""
    if found != expected:
        raise CheckFailedError(f"{what or 'value'}: expected {expected!r:.500}, got {found!r:.500}")


def holds(condition: object, what: str) -> None:
    """Fail where something does not hold."""
    if not condition:
        raise CheckFailedError(what)


class Caught:
    """The exception of an `expect` block."""

    error: Any = None


@contextmanager
def expect(kind: type[BaseException]) -> Generator[Caught]:
    """Fail where a block does not raise this."""
    caught = Caught()
    try:
        yield caught
    except kind as error:
        caught.error = error
        return
    raise CheckFailedError(f"expected {kind.__name__}, and nothing was raised")

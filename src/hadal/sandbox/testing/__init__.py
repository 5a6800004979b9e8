"""What every backend must do: checks to run against any of them, from a test or from the command line.

for check in all_checks():
    if check.needs <= ContainerSpec.capabilities:
        check.run(lambda **changes: Sandbox.create(ContainerSpec(**changes)))
"""

from hadal.sandbox.testing.registry import Check, CheckFailedError, MakeBox, all_checks

__all__ = ["Check", "CheckFailedError", "MakeBox", "all_checks"]

"""The command line as a user has it: real processes, with an embedded node of their own."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["HADAL", "CommandLine"]

HADAL = str(Path(sys.executable).with_name("hadal"))


class CommandLine:
    """Runs `hadal`, with its state in a folder."""

    def __init__(self, home):
        self.environment = os.environ | {"HADAL_HOME": str(home)}
        for name in ("HADAL_NODE", "HADAL_NODE_KEY", "HADAL_NODE_CA"):
            self.environment.pop(name, None)

    def __call__(self, *arguments, stdin=b"", code=0, **environment):
        result = subprocess.run(
            [HADAL, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            timeout=60,
            env=self.environment | environment,
        )
        assert b"Traceback" not in result.stderr, result.stderr.decode()
        assert result.returncode == code, result.stderr.decode()
        return result

    def text(self, *arguments, **options):
        return self(*arguments, **options).stdout.decode()

    def refused(self, *arguments, code=3, **options):
        """Return what is said on standard error, and on standard output where usage is wrong."""
        result = self(*arguments, code=code, **options)
        return (result.stderr + result.stdout).decode()

    def start(self, *arguments, **options):
        return subprocess.Popen([HADAL, *map(str, arguments)], env=self.environment, **options)

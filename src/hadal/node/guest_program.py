"""Where the guest program is."""

import os
from pathlib import Path

from hadal.errors import UnsupportedError

__all__ = ["guest_program"]


def guest_program() -> Path:
    """Return the path of the program that makes boxes and is their init.

    Raises:
        UnsupportedError: This installation was built without a C compiler.
    """
    path = Path(__file__).parent / "bin" / "hadal-guest"
    if not os.access(path, os.X_OK):
        raise UnsupportedError(
            f"no guest program at {path}: this installation was built without a C compiler",
            hint="install gcc (Debian: apt-get install gcc libc6-dev) and install hadal again",
        )
    return path

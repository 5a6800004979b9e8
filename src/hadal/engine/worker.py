"""`python -m hadal.engine.worker`: one of the processes of a divided engine; `launch.py` starts it.

Its order comes as one line of JSON on standard input, which stays open for as long as the process that
gave it lives.
"""

import json
import os
import sys
import threading

from hadal.engine.launch import follow
from hadal.errors import HadalError

__all__ = ["main"]


def main() -> None:
    """Follow the process that started this one, and end with it."""
    order = json.loads(_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        follow(order)
    except HadalError as err:
        sys.stderr.write(f"hadal worker {order['rank']}: {err}\n")
        sys.exit(1)


def _line() -> bytes:
    # Not sys.stdin: its lock would be held by the thread below when the interpreter ends.
    line = b""
    while not line.endswith(b"\n") and (more := os.read(0, 1 << 16)):
        line += more
    return line


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    main()

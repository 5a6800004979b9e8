"""Points at which a test ends the daemon or fails what it does; without the variable they do nothing.

`HADAL_FAULT=kill:7` ends the process with SIGKILL when it comes to the seventh point, `full:7` lets that
one fail as a full disk does. The points lie before and after everything that changes what a restart finds.
"""

import errno
import itertools
import os
import signal

__all__ = ["reach"]

_KIND, _, _NUMBER = os.environ.get("HADAL_FAULT", "").partition(":")
_AT = int(_NUMBER) if _NUMBER.isdigit() else 0
_COUNT = itertools.count(1)


def reach(name: str, *, writes: bool = True) -> None:
    """Come to a point; one that `writes` nothing cannot meet a full disk.

    Raises:
        OSError: ENOSPC, where a test asked for it.
    """
    if not _AT or (_KIND == "full" and not writes) or next(_COUNT) != _AT:
        return
    if _KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, f"fault at {name}")

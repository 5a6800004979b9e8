"""The node daemon that the first `Sandbox.create` starts, where no other node is named."""

import fcntl
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from hadal.errors import NodeError

__all__ = ["answers", "default_node_url", "ensure_node", "state_folder", "wait_until_ended"]

_START_S = 30
_SAID_BYTES = 1 << 20


def state_folder() -> Path:
    """Return where the embedded node keeps its boxes: $HADAL_HOME/node, or under the user's state."""
    home = os.environ.get("HADAL_HOME")
    if home:
        return Path(home) / "node"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "hadal" / "node"


def default_node_url() -> str | None:
    """Return the node that the environment names (HADAL_NODE), or None for the embedded one."""
    return os.environ.get("HADAL_NODE") or None


def ensure_node() -> str:
    """Start the embedded node, if it does not run, and return its URL.

    It outlives this process, so that boxes do; without boxes and callers it ends after a minute.

    Raises:
        NodeError: It does not start, with what it said.
    """
    folder = state_folder()
    socket = folder / "node.sock"
    if answers(socket):
        return f"unix://{socket}"
    if find_spec("hadal.node") is None:
        raise NodeError("this installation has no node", hint="pip install 'hadal[node]'")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # What it writes to its standard streams: why it does not start, or a traceback. The log itself is
    # node.log, which the daemon keeps from growing.
    log = folder / "node.err"
    if log.exists() and log.stat().st_size > _SAID_BYTES:
        log.unlink(missing_ok=True)
    read, write = os.pipe()
    with log.open("ab") as output:
        began = output.tell()
        pid = _spawn(
            [sys.executable, "-m", "hadal.node", str(folder), str(socket)], output.fileno(), write
        )
    os.close(write)
    with os.fdopen(read, "rb") as ready:
        if ready.readline():
            return f"unix://{socket}"
    # It has ended: perhaps because another process has started one at the same time.
    deadline = time.monotonic() + _START_S
    os.waitpid(pid, 0)
    while "another node daemon" in _said(log, began) and time.monotonic() < deadline:
        if answers(socket):
            return f"unix://{socket}"
        time.sleep(0.02)
    raise NodeError(
        f"the node daemon did not start: {_said(log, began)[-2000:]}", hint=f"see {log}"
    )


def _spawn(command: list[str], output: int, ready: int) -> int:
    """Start a process that is not our child in any sense but the system's: nobody waits for it."""
    os.set_inheritable(ready, True)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    return os.posix_spawn(
        command[0], [*command, str(ready)], os.environ, file_actions=actions, setsid=True
    )


def _said(log: Path, began: int) -> str:
    with log.open("rb") as file:
        file.seek(began)
        return file.read().decode(errors="replace").strip()


def answers(path: Path) -> bool:
    """Return whether somebody listens at a Unix socket."""
    import socket

    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def wait_until_ended(state: Path) -> None:
    """Wait until no daemon has a state folder any more.

    Raises:
        NodeError: One has, after half a minute.
    """
    deadline = time.monotonic() + _START_S
    with (state / "lock").open("rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NodeError(
                        f"the node daemon of {state} does not end", hint="node.log may say why"
                    ) from None
                time.sleep(0.02)
            else:
                return

"""`python -m hadal.node STATE SOCKET READY`: the daemon that the SDK starts for itself."""

import os
import sys
from pathlib import Path

from hadal.node.daemon import Listen, log_to_file, run_daemon
from hadal.node.node_config import NodeConfig

IDLE_EXIT_S = 60


def main() -> int:
    """Run it."""
    os.chdir("/")
    state, socket, ready = sys.argv[1:]
    log_to_file(Path(state) / "node.log")
    return run_daemon(
        NodeConfig(state=Path(state), name=f"embedded-{Path(state).stat().st_ino}"),
        Listen(socket=Path(socket), ready=int(ready), idle_exit_s=IDLE_EXIT_S),
    )


if __name__ == "__main__":
    sys.exit(main())

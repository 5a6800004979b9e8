"""The programs of a run, as users start them, with a home of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HADAL = [sys.executable, "-m", "hadal"]


class Programs:
    """A server, agents and a node that can be killed and started again.

    Args:
        home: Of the node.
        folder: For logs.
    """

    def __init__(self, home, folder):
        self.env = os.environ | {"HADAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.home = home
        self.folder = folder
        self.port = 0
        self.server = None
        self.agents = {}

    def start_server(self):
        """Start the server, at the same port as before."""
        log = self.folder / "server.log"
        with log.open("wb") as output:
            self.server = subprocess.Popen(
                [*HADAL, "serve", "nano", "--port", str(self.port)], stderr=output, env=self.env
            )
        deadline = time.monotonic() + 120
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert self.server.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.port = int(found.group(1))

    def start_agent(self, number, tasks, into):
        """Start an agent on some tasks; or let it go on with them."""
        named = [part for task in tasks for part in ("--task", task)]
        model = ("--model", f"http://127.0.0.1:{self.port}", "--tokenizer", "nano")
        with (self.folder / f"agent-{number}.log").open("ab") as output:
            self.agents[number] = subprocess.Popen(
                [*HADAL, "eval", *model, "--into", into, "--at-once", "2", *named],
                stdout=output, stderr=output, env=self.env,
            )  # fmt: skip

    def kill_node(self):
        """Kill the daemon of the boxes; return whether there was one."""
        for found in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = found.read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if b"hadal.node" in arguments and str(self.home / "node").encode() in arguments:
                os.kill(int(found.parent.name), signal.SIGKILL)
                return True
        return False

    def stop(self):
        """End everything."""
        for process in (*self.agents.values(), self.server):
            if process is not None:
                process.kill()
                process.wait()


@pytest.fixture
def programs(node, tmp_path):
    made = Programs(node, tmp_path)
    yield made
    made.stop()

"""The daemon of a node whose microVMs run on Firecracker, or on what stands in for it; called as `hadal.node` is."""

import os
import sys
import sysconfig
from pathlib import Path

from hadal.node import slots
from hadal.node.daemon import Listen, log_to_file, run_daemon
from hadal.node.machines import choice
from hadal.node.machines.plan import Plan
from hadal.node.node_config import NodeConfig

ROOT = Path(__file__).parents[2]


PACKAGES = Path(sysconfig.get_path("purelib"))
BASE = Path(sys.base_prefix)
PYTHON = BASE if BASE.is_relative_to("/usr") else Path("/python")
"""Where jails have the interpreter: they see /usr, and no home of anybody's."""


def main():
    """Run it."""
    state, socket, ready = sys.argv[1:]
    log_to_file(Path(state) / "node.log")
    if os.environ.get("HADAL_FIRECRACKER_CHECK") != "1":
        use_fake(Path(state) / "firecracker")
    os.chdir("/")
    config = NodeConfig(
        state=Path(state), name=f"embedded-{Path(state).stat().st_ino}", microvm="firecracker"
    )
    return run_daemon(config, Listen(socket=Path(socket), ready=int(ready), idle_exit_s=60))


def use_fake(program):
    """Let this process start the fake where it would start Firecracker."""
    python = f"{PYTHON}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    text = (
        "#!/bin/sh\nPYTHONPATH=/fake:/fake/src:/packages PYTHONDONTWRITEBYTECODE=1"
        f" LD_LIBRARY_PATH={PYTHON}/lib"
        f' exec {python} -m tests.sandbox.fake_firecracker "$@"\n'
    )
    if not program.exists() or program.read_text() != text:
        program.write_text(text)  # when it is new, nothing that it has saved can be restored
        program.chmod(0o755)
    choice.choose_accelerator = lambda wanted: "kvm"
    choice.firecracker_program = lambda: str(program)
    seen = {Path("/fake"): ROOT, Path("/packages"): PACKAGES, program: program}
    seen |= {} if PYTHON == BASE else {PYTHON: BASE}
    more = [(path, str(at), True) for at, path in seen.items()]
    binds = Plan.binds
    Plan.binds = lambda plan: binds(plan) + more
    slots.MEMORY_OF_QEMU_MB = (
        512  # an interpreter, and pages of the file that a snapshot is written to
    )


if __name__ == "__main__":
    sys.exit(main())

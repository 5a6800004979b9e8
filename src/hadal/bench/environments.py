"""Environments of their own for peers, made by the command that runs them and kept for the next time."""

import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

from hadal.errors import EngineError

__all__ = ["llama_cpp", "transformers"]

_LLAMA_CPP = "llama-cpp-python==0.3.36"
_TRANSFORMERS = "transformers==5.23.0"


def llama_cpp(folder: Path) -> Path:
    """Return a Python that has llama.cpp, which is compiled the first time: some ten minutes.

    Raises:
        EngineError: It could not be installed.
    """
    return _made(folder / "llama-cpp", [_LLAMA_CPP, "numpy"])


def transformers(folder: Path) -> Path:
    """Return a Python that has transformers, beside the same torch as this one and what hadal.bench imports.

    Raises:
        EngineError: It could not be installed.
    """
    own = [line.split(";")[0] for line in requires("hadal") or () if _is_needed(line)]
    return _made(
        folder / "transformers",
        [_TRANSFORMERS, "accelerate", f"torch=={version('torch')}", *own],
    )


def _is_needed(requirement: str) -> bool:
    return "extra ==" not in requirement or "extra == 'engine'" in requirement.replace('"', "'")


def _made(folder: Path, packages: Sequence[str]) -> Path:
    python, done = folder / "bin" / "python", folder / "installed"
    if done.is_file() and done.read_text(encoding="utf-8") == "\n".join(packages):
        return python
    sys.stderr.write(f"installing {packages[0]} in {folder}\n")
    venv.create(folder, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    if result.returncode:
        raise EngineError(
            f"{packages[0]} could not be installed in {folder}: pip ended with {result.returncode}",
            hint="it needs a package index, and a C++ compiler and CMake for llama.cpp; see its messages above",
        )
    done.write_text("\n".join(packages), encoding="utf-8")
    return python

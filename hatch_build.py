"""Compiles guest/ and native/ into the package: a static program and a library, with the C compiler that is there.

Without a compiler the rest of the package installs and works: the model computes without kernels, and `hadal doctor`
and the first box say what is missing.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-std=gnu11", "-Os", "-static", "-Wall", "-Wextra", "-fstack-protector-strong"]
PROGRAM = Path("src/hadal/node/bin/hadal-guest")
# What a processor can do is asked when the library is used: nothing here depends on the one that compiles it.
LIBRARY_FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-fPIC",
    "-shared",
]
LIBRARY = Path("src/hadal/model/kernels/libhadal_cpu.so")


class GuestBuildHook(BuildHookInterface):
    """Adds the program to wheels and to editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless there is nothing to compile with."""
        root = Path(self.root)
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            self.app.display_warning(
                "no C compiler: built without the guest program of sandboxes and without kernels"
            )
            return
        guest = sorted((root / "guest").glob("*.c"))
        self._compile(build_data, [compiler, *FLAGS, *map(str, guest)], PROGRAM)
        native = sorted((root / "native").glob("*.c"))
        self._compile(
            build_data, [compiler, *LIBRARY_FLAGS, *map(str, native), "-lm", "-lpthread"], LIBRARY
        )
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _compile(self, build_data: dict[str, Any], call: list[str], target: Path) -> None:
        """Make one file of the package."""
        path = Path(self.root) / target
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")  # the old one may be in use
        subprocess.run([*call, "-o", str(made)], check=True)
        made.replace(path)
        build_data["force_include"][str(path)] = str(target.relative_to("src"))

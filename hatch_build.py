"""Compiles guest/ into the package: one static program, with the C compiler that is there.

Without a compiler the rest of the package installs and works; `hadal doctor` and the first box say what is
missing.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-std=gnu11", "-Os", "-static", "-Wall", "-Wextra", "-fstack-protector-strong"]
PROGRAM = Path("src/hadal/node/bin/hadal-guest")


class GuestBuildHook(BuildHookInterface):
    """Adds the program to wheels and to editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless there is nothing to compile with."""
        root = Path(self.root)
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            self.app.display_warning("no C compiler: built without the guest program of sandboxes")
            return
        program = root / PROGRAM
        program.parent.mkdir(parents=True, exist_ok=True)
        made = program.with_suffix(f".{os.getpid()}")  # boxes may be running the old one
        sources = sorted((root / "guest").glob("*.c"))
        subprocess.run([compiler, *FLAGS, "-o", made, *sources], check=True)
        made.replace(program)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"][str(program)] = str(PROGRAM.relative_to("src"))

"""Plant faults, one at a time, and see at least one test fail for each.

    python scripts/mutants.py              all of them
    python scripts/mutants.py --only yarn  those whose name contains "yarn"
    python scripts/mutants.py --list
    python scripts/mutants.py --tests-pass   the tests have just run, and passed, without a fault

Each fault is a replacement of source text in a copy of the tree; the text must occur exactly once,
so a fault cannot vanish when the code changes. Each names the tests that should find it (`faults/`);
they stop at the first failure, and all of them must pass without a fault. Exit code 1 if a fault
survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.engine import ENGINE
from faults.model import MODEL
from faults.mutant import Mutant

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = (*MODEL, *ENGINE)


def plant(mutant: Mutant | None, tree: Path) -> None:
    """Write a copy of the sources, with the fault in it if there is one."""
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    if mutant is None:
        return
    file = tree / "src" / "hadal" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: expected once in {mutant.file}, found {text.count(mutant.old)}")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run_tests(tree: Path, tests: tuple[str, ...]) -> str | None:
    """Return the first failing test, or None if all pass."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "--tb=no",
        "-m",
        "not slow",
        *tests,
    ]
    result = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    for line in result.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" - ")[0].split(" ", 1)[1]
    return None if result.returncode == 0 else f"exit code {result.returncode}"


def judge(mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[str | None, float]:
    """Plant a fault (None: nothing) and return the test that found it, and the seconds it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hadal-mutant-") as folder:
        tree = Path(folder)
        plant(mutant, tree)
        return run_tests(tree, tests), time.monotonic() - start


def main() -> int:
    """Judge the chosen faults, several at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--tests-pass", action="store_true", help="do not run them without a fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in m.name]
    if arguments.list or not chosen:
        print("\n".join(m.name for m in MUTANTS))
        return 0 if arguments.list else 2
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        all_tests = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
        clean = None if arguments.tests_pass else pool.submit(judge, None, all_tests)
        found = pool.map(lambda m: judge(m, m.tests), chosen)
        for mutant, (test, seconds) in zip(chosen, found, strict=True):
            survivors += test is None
            print(
                f"{'SURVIVED' if test is None else 'found':8} {mutant.name}: "
                f"{test or 'no test failed'} ({seconds:.0f} s)",
                flush=True,
            )
        if clean is not None and (broken := clean.result()[0]) is not None:
            print(f"the tests fail without any fault: {broken}")
            return 1
    unplanted = "" if clean is None else "; without a fault all tests pass"
    print(f"{len(chosen) - survivors} of {len(chosen)} faults found{unplanted}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Plant faults in the model, one at a time, and see at least one test fail for each.

    python scripts/mutants.py              all of them
    python scripts/mutants.py --only yarn  those whose name contains "yarn"
    python scripts/mutants.py --list

Each fault is a replacement of source text in a copy of the tree; the text must occur exactly once,
so a fault cannot vanish when the code changes. The tests that run are the fast ones about the
model, stopping at the first failure. Exit code 1 if a fault survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (  # quickest to find something first
    "tests/unit/test_mechanisms.py",
    "tests/unit/test_selection.py",
    "tests/unit/test_quant.py",
    "tests/parity/test_published_precision.py",
    "tests/parity/test_mtp.py",
    "tests/unit/test_training.py",
    "tests/parity/test_invariance.py",
    "tests/parity/test_transformers.py",
)


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "window off by one",
        "core_attention.py",
        "(distance >= 0) & (distance < keys.window)",
        "(distance >= 0) & (distance <= keys.window)",
    ),
    Mutant(
        "wrong rope sign on the output",
        "attention.py",
        "rotate(torch.cat(outputs), batch.rotation(self.kind), inverse=True)",
        "rotate(torch.cat(outputs), batch.rotation(self.kind), inverse=False)",
    ),
    Mutant(
        "rope in halves instead of interleaved",
        "rope.py",
        "even, odd = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)",
        "even, odd = rotated.float().unflatten(-1, (2, -1)).unbind(-2)",
    ),
    Mutant(
        "missing overlap",
        "compressor.py",
        "before_gate = torch.cat((tail.previous_gate.unsqueeze(0), gate_CWK[..., :width]))",
        "before_gate = torch.full_like(before_kv, float('-inf'))",
    ),
    Mutant(
        "unscaled router",
        "moe.py",
        "chosen.sum(dim=1, keepdim=True) * self.config.routed_scaling_factor",
        "chosen.sum(dim=1, keepdim=True)",
    ),
    Mutant(
        "sinkhorn transposed",
        "mhc.py",
        "(comb_TMM[:, :, k, None] * old_TMD).sum(dim=1)",
        "(comb_TMM[:, k, :, None] * old_TMD).sum(dim=1)",
    ),
    Mutant(
        "sink left out",
        "core_attention.py",
        "torch.cat((logits_BHS, sink_BH1), dim=-1).softmax(dim=-1)[..., :-1]",
        "logits_BHS.softmax(dim=-1)",
    ),
    Mutant(
        "top-k looks one block into the future",
        "selection.py",
        "return (positions_T + 1) // rate",
        "return (positions_T + 1) // rate + 1",
    ),
    Mutant(
        "yarn on a window-only layer",
        "rope.py",
        "config.rope_scaling if compressed else None,",
        "config.rope_scaling,",
    ),
    Mutant(
        "clamp left out",
        "moe.py",
        "up = self.w3(x_TD).float().clamp(-self.limit, self.limit)",
        "up = self.w3(x_TD).float()",
    ),
    Mutant(
        "MTP fed the wrong token",
        "training.py",
        "next_ids_T, next_labels_T = ids_T.roll(-1)[keep], labels_T.roll(-1)[keep]",
        "next_ids_T, next_labels_T = ids_T[keep], labels_T.roll(-1)[keep]",
    ),
    # Beyond the eleven that were asked for: faults that others shipped (spec 8.2).
    Mutant(
        "tie goes to the highest index",
        "selection.py",
        "(scores.float() + 0.0)",
        "(scores.float() + 1e-9 * index)",
    ),
    Mutant(
        "entry rotated at its index",
        "compressor.py",
        "rotation(self.config, self.kind, entry_idx * self.rate)",
        "rotation(self.config, self.kind, entry_idx)",
    ),
    Mutant(
        "theta 10000 in compressed layers",
        "rope.py",
        "config.compress_rope_theta if compressed else config.rope_theta,",
        "config.rope_theta,",
    ),
    Mutant(
        "hadamard on queries only",
        "attention.py",
        "cache.index_keys.append(self.indexer.simulate_storage(keys))",
        "cache.index_keys.append(keys)",
    ),
    Mutant(
        "indexer without relu",
        "indexer.py",
        "product(query[:, head], key).relu()",
        "product(query[:, head], key)",
    ),
    Mutant(
        "bias weighs as well as chooses",
        "moe.py",
        "weights_TA = self.gate.weights(scores_TE, routes_TA)",
        "weights_TA = self.gate.weights(\n"
        "            scores_TE if self.gate.bias is None else scores_TE + self.gate.bias, routes_TA\n"
        "        )",
    ),
    Mutant(
        "indexer loss reaches the model",
        "attention.py",
        "x_TD, latent_TR = x_TD.detach(), latent_TR.detach()",
        "pass",
    ),
    Mutant(
        "rollback forgets the window",
        "cache.py",
        "self.window, self.tail, self.index_tail = slot.window, slot.tail, slot.index_tail",
        "self.tail, self.index_tail = slot.tail, slot.index_tail",
    ),
    Mutant(
        "compressors and other plain matrices quantise their input",
        "linear.py",
        "if self.precision.activations_fp8 and self.role in (Role.DENSE, Role.EXPERT):",
        "if self.precision.activations_fp8:",
    ),
    Mutant(
        "entries not rounded as the cache stores them",
        "attention.py",
        "cache.entries.append(self._simulate_storage(entries))",
        "cache.entries.append(entries)",
    ),
    Mutant("KV scales for 128 channels", "quant/entries.py", "_BLOCK = 64", "_BLOCK = 128"),
    Mutant(
        "no floor under activation scales",
        "quant/fp8.py",
        "_AMAX_FLOOR = 1e-4",
        "_AMAX_FLOOR = 1e-30",
    ),
    Mutant(
        "index scores unscaled",
        "indexer.py",
        "self.scale = width**-0.5 * heads**-0.5",
        "self.scale = 1.0",
    ),
    Mutant(
        "sparse indexer loss over all entries",
        "indexer.py",
        "scores_TC.gather(1, selections[-1].index_TS) if best",
        "scores_TC[:, : selections[-1].index_TS.shape[1]] if best",
    ),
    Mutant(
        "tail kept without its bias",
        "compressor.py",
        "return self.wkv(x), self.wgate(x) + self.ape[positions_T % self.rate]",
        "return self.wkv(x), self.wgate(x) + self.ape[(positions_T - positions_T[0]) % self.rate]",
    ),
)


def plant(mutant: Mutant, tree: Path) -> None:
    """Write a copy of the sources with the fault in it."""
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    file = tree / "src" / "hadal" / "model" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: expected once in {mutant.file}, found {text.count(mutant.old)}")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run_tests(tree: Path) -> str | None:
    """Return the first failing test, or None if all pass."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", *TESTS]
    result = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    for line in result.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" - ")[0].split(" ", 1)[1]
    return None if result.returncode == 0 else f"exit code {result.returncode}"


def judge(mutant: Mutant | None) -> tuple[str | None, float]:
    """Plant a fault (None: nothing) and return the test that found it, and the seconds it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hadal-mutant-") as folder:
        tree = Path(folder)
        plant(
            mutant or Mutant("none", "moe.py", '"""The feed-forward', '"""The feed-forward'), tree
        )
        return run_tests(tree), time.monotonic() - start


def main() -> int:
    """Judge the chosen faults, several at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in m.name]
    if arguments.list or not chosen:
        print("\n".join(m.name for m in MUTANTS))
        return 0 if arguments.list else 2
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        clean = pool.submit(judge, None)
        for mutant, (test, seconds) in zip(chosen, pool.map(judge, chosen), strict=True):
            survivors += test is None
            print(
                f"{'SURVIVED' if test is None else 'found':8} {mutant.name}: "
                f"{test or 'no test failed'} ({seconds:.0f} s)",
                flush=True,
            )
        if (broken := clean.result()[0]) is not None:
            print(f"the tests fail without any fault: {broken}")
            return 1
    print(
        f"{len(chosen) - survivors} of {len(chosen)} faults found; without a fault all tests pass"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the encoding against DeepSeek's own library and its parser against itself, at full count.

    python scripts/fuzz_encoding.py [--conversations 100000] [--completions 1000000] [--seed 0]

The property tests do the same at a small count. Every failure prints the seed that repeats it.
"""

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepseek_recipe as recipe
from tests.golden.data import tokenizer, tokenizer_file
from tests.property import completions, conversations

from hadal.encoding import Encoding

BATCH = 500
IDS_EVERY = 10
"""One conversation in this many is also compared id by id."""


def fuzz_conversations(seed: int) -> tuple[Counter[str], str | None]:
    """One batch, V4 and V4.1: (count of each outcome, first difference)."""
    rng = random.Random(seed)
    pairs = [
        (Encoding.load("v4-0731", tokenizer=tokenizer()), recipe.DeepseekV4Encoding()),
        (Encoding.load("v4.1"), recipe.DeepseekV41Encoding()),
    ]
    with_ids = pairs[0][1].with_tokenizer(recipe.Tokenizer.from_file(str(tokenizer_file())))
    seen: Counter[str] = Counter()
    for i in range(BATCH):
        drawn = conversations.draw(rng)
        ours, their = pairs[i % 2]
        difference = conversations.difference(drawn, ours, their)
        if difference:
            return seen, f"seed {seed}, conversation {i}: {difference}"
        seen[f"{ours.generation.name} conversations"] += 1
        if i % IDS_EVERY == 0:
            settings = {k: v for k, v in drawn.items() if k != "messages"}
            ids = pairs[0][0].encode(drawn["messages"], generation_prompt=True, **settings)
            if ids != with_ids.encode(conversations.theirs(drawn)):
                return seen, f"seed {seed}, conversation {i}: other ids"
            seen["conversations id by id"] += 1
    return seen, None


def fuzz_completions(seed: int) -> tuple[Counter[str], str | None]:
    """One batch: (count of each termination, first failure)."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for i in range(BATCH):
        case = completions.draw_case(rng)
        try:
            message = completions.check(case, completions.draw_pieces(rng, case.text))
        except Exception as err:  # noqa: BLE001 - any failure is a finding, reported with its seed
            return seen, f"seed {seed}, completion {i}: {type(err).__name__}: {err}\n{case}"
        seen[str(message.termination)] += 1
    return seen, None


def main() -> int:
    """Run both, and print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--conversations", type=int, default=100_000)
    options.add_argument("--completions", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    failed = False
    with multiprocessing.get_context("spawn").Pool() as pool:
        for name, run, count in (
            ("conversations", fuzz_conversations, given.conversations),
            ("completions", fuzz_completions, given.completions),
        ):
            batches = -(-count // BATCH)
            total, failures, began = Counter(), [], time.monotonic()
            seeds = range(given.seed, given.seed + batches)
            for done, (seen, failure) in enumerate(pool.imap_unordered(run, seeds), 1):
                total += seen
                failures += [failure] if failure else []
                if done % 100 == 0:
                    print(f"{name}: {done * BATCH:,} done", file=sys.stderr)
            print(f"{name}: {batches * BATCH:,} in {time.monotonic() - began:.0f} s")
            for what, n in sorted(total.items()):
                print(f"  {what}: {n:,}")
            print(f"  failures: {len(failures)}")
            for failure in failures[:5]:
                print(f"  {failure}")
            failed |= bool(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""W5: time to the first token with a shared prompt: computed, from memory, after eviction, after a restart."""

import random
import tempfile
from pathlib import Path

from hadal.bench.networks import NetworkName, network
from hadal.bench.report import Report, Spread, timed
from hadal.engine import LLM, Completion, SamplingParams
from hadal.model import Transformer

__all__ = ["measure"]

_STATES = ("cold", "memory", "resent", "disk", "restart")
_FIRST = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)


def measure(name: NetworkName, shared: int, tails: int, rounds: int) -> Report:
    """Send prompts that share their beginning, in every state of the cache.

    Every prompt of a state is compared with the same prompt computed without any reuse: tokens and
    log-probabilities have to be the same bits.
    """
    report = Report(
        f"W5 prefix reuse: {name}, {shared} shared tokens, {tails} tails of 64 to 1,024"
    )
    rng = random.Random(0)
    model = network(name)
    vocab = model.config.vocab_size
    common = [rng.randrange(2, vocab) for _ in range(shared)]
    prompts = [
        common + [rng.randrange(2, vocab) for _ in range(rng.randint(64, 1024))]
        for _ in range(tails)
    ]
    times: dict[str, list[float]] = {state: [] for state in _STATES}
    wrong = hits_off = 0
    for number in range(rounds):
        prompt = prompts[number % tails]
        with tempfile.TemporaryDirectory() as folder:
            found = _round(model, common, prompt, Path(folder), times)
        reference, *reused = found
        wrong += sum(not _same(reference, other) for other in reused)
        expected = shared // 128 * 128
        known = [expected, (len(prompt) - 1) // 128 * 128, expected, expected]
        hits_off += sum(o.prefix.hit != n for o, n in zip(reused, known, strict=True))
    spreads = {state: Spread.of(values) for state, values in times.items()}
    report.figures |= {f"{state}: seconds to the first token": s for state, s in spreads.items()}
    for state in _STATES[1:]:
        ratios = [a / b for a, b in zip(times[state], times["cold"], strict=True)]
        report.figures[f"{state} over cold"] = Spread.of(ratios)
    report.figures |= {
        "answers that differ from cold": float(wrong),
        "hits that are not the shared blocks": float(hits_off),
    }
    report.notes.append("goal: 5 % of cold from memory, 15 % from disk")
    report.notes.append(
        "memory, disk, restart: the tail is new and computed; resent: the whole prompt is known"
    )
    return report


def _round(
    model: Transformer,
    common: list[int],
    prompt: list[int],
    folder: Path,
    times: dict[str, list[float]],
) -> list[Completion]:
    """Run one prompt cold, from memory, after eviction and after a restart."""
    limit = len(prompt) + 128
    found: list[Completion] = []

    def run(llm: LLM, state: str) -> None:
        times[state].append(timed(lambda: found.extend(llm.generate([prompt], _FIRST))))

    cold = LLM(model, max_model_len=limit)
    run(cold, "cold")
    llm = LLM(model, max_model_len=limit, disk_path=folder)
    llm.generate([[*common, prompt[-1]]], _FIRST)
    run(llm, "memory")
    run(llm, "resent")
    # What only this prompt added must not help the next states.
    llm.engine.close()
    for state in ("disk", "restart"):
        with tempfile.TemporaryDirectory() as fresh:
            writer = LLM(model, max_model_len=limit, disk_path=Path(fresh))
            writer.generate([[*common, prompt[-1]]], _FIRST)
            if state == "disk":
                writer.engine.cache.clear()
                run(writer, state)
                writer.engine.close()
            else:
                writer.engine.close()
                reader = LLM(model, max_model_len=limit, disk_path=Path(fresh))
                run(reader, state)
                reader.engine.close()
    return found


def _same(a: Completion, b: Completion) -> bool:
    return a.token_ids == b.token_ids and a.logprobs == b.logprobs

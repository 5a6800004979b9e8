"""W5: time to the first token with a shared prompt: computed, from memory, after eviction, after a restart."""

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hadal.bench import llama_cpp_peer
from hadal.bench.networks import NetworkName, network, write_network
from hadal.bench.report import ClockName, Report, Spread, timed
from hadal.bench.side import SideProcess
from hadal.engine import LLM, Completion, SamplingParams
from hadal.model import Transformer

__all__ = ["measure"]

_STATES = ("cold", "memory", "resent", "disk", "restart")
_ABOUT_LLAMA_CPP = (
    "llama.cpp: its state is kept whole at the end of what is known, and restored; only a prompt that "
    "begins with exactly that can use it. Experts in 4 bits, keys in float16"
)
_FIRST = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)


def measure(
    name: NetworkName,
    shared: int,
    tails: int,
    rounds: int,
    *,
    llama_cpp: Path | None = None,
    clock: ClockName = "wall",
) -> Report:
    """Send prompts that share their beginning, in every state of the cache.

    Every prompt of a state is compared with the same prompt computed without any reuse: tokens and
    log-probabilities have to be the same bits.

    Args:
        name: Which random network.
        shared: Tokens that the prompts have in common.
        tails: Different continuations.
        rounds: Repetitions of all states, in turn with the peer.
        llama_cpp: Python of an environment with llama-cpp-python, to run it too.
        clock: Of all figures.
    """
    report = Report(
        f"W5 prefix reuse: {name}, {shared} shared tokens, {tails} tails of 64 to 1,024, {clock} time"
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
    with ExitStack() as stack:
        peer = None
        if llama_cpp is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_network(name, folder, ["gguf"])
            peer = _Peer(llama_cpp_peer.start(stack, llama_cpp, folder / "gguf"), clock)
        for number in range(rounds):
            prompt = prompts[number % tails]
            if peer is not None:
                peer.round(common, prompt)
            with tempfile.TemporaryDirectory() as folder:
                found = _round(model, common, prompt, Path(folder), times, clock)
            reference, *reused = found
            wrong += sum(not _same(reference, other) for other in reused)
            expected = shared // 128 * 128
            known = [expected, (len(prompt) - 1) // 128 * 128, expected, expected]
            hits_off += sum(o.prefix.hit != n for o, n in zip(reused, known, strict=True))
    _add_times(report, "", times)
    report.figures |= {
        "answers that differ from cold": float(wrong),
        "hits that are not the shared blocks": float(hits_off),
    }
    if peer is not None:
        peer.describe(report, times)
    report.notes += [
        "goal: 5 % of cold from memory where the prompt is resent, 15 % from disk",
        "memory, disk, restart: the tail is new and computed; resent: the whole prompt is known",
        llama_cpp_peer.HOW_TO_GET_IT if llama_cpp is None else _ABOUT_LLAMA_CPP,
    ]
    return report


def _add_times(report: Report, prefix: str, times: dict[str, list[float]]) -> None:
    """Add the seconds of every state, and those with reuse over those without, round by round."""
    for state, values in times.items():
        report.figures[f"{prefix}{state}: seconds to the first token"] = Spread.of(values)
    for state, values in times.items():
        if state != "cold":
            ratios = [a / b for a, b in zip(values, times["cold"], strict=True)]
            report.figures[f"{prefix}{state} over cold"] = Spread.of(ratios)


class _Peer:
    """llama.cpp with the same prompts: its state after a prefix, kept in memory and restored."""

    def __init__(self, side: SideProcess, clock: ClockName) -> None:
        self._side = side
        self._clock = clock
        self._times: dict[str, list[float]] = {state: [] for state in ("cold", "memory", "resent")}
        self._errors = {"memory": 0.0, "resent": 0.0}
        self._kept_bytes = 0

    def round(self, common: list[int], prompt: list[int]) -> None:
        """Compute a prompt cold, then from the state after its beginning, then after all of it."""
        cold = self._side.ask({"keep": prompt})
        self._times["cold"].append(cold[self._clock])
        for state, known in (("memory", common), ("resent", prompt[:-1])):
            kept = self._side.ask({"keep": known})
            self._kept_bytes = kept["bytes"]
            reused = self._side.ask({"resume": prompt})
            self._times[state].append(reused[self._clock])
            pairs = zip(cold["logits"], reused["logits"], strict=True)
            error = max(abs(a - b) for a, b in pairs)
            self._errors[state] = max(self._errors[state], error)

    def describe(self, report: Report, ours: dict[str, list[float]]) -> None:
        """Add its figures, and ours over its."""
        _add_times(report, "llama.cpp, ", self._times)
        for state, values in self._times.items():
            ratios = [a / b for a, b in zip(ours[state], values, strict=True)]
            report.figures[f"hadal over llama.cpp, {state}: time"] = Spread.of(ratios)
        for state, error in self._errors.items():
            report.figures[f"llama.cpp, {state}: largest difference of a logit from cold"] = error
        report.figures["llama.cpp: bytes of a kept state"] = float(self._kept_bytes)


def _round(
    model: Transformer,
    common: list[int],
    prompt: list[int],
    folder: Path,
    times: dict[str, list[float]],
    clock: ClockName,
) -> list[Completion]:
    """Run one prompt cold, from memory, after eviction and after a restart."""
    limit = len(prompt) + 128
    found: list[Completion] = []

    def run(llm: LLM, state: str) -> None:
        times[state].append(timed(lambda: found.extend(llm.generate([prompt], _FIRST)), clock))

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

"""W1, W2, W3: a prompt and decoding after it, alone, at growing lengths, beside peers and the machine.

Every side runs in a process of its own; in every round each has its turn, and the machine's limits
are measured again. Ratios are taken round by round.
"""

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import hadal
from hadal.bench import llama_cpp_peer
from hadal.bench.machine_limits import Limits, LimitsOfRounds
from hadal.bench.networks import NETWORKS, FileKind, NetworkName, write_network
from hadal.bench.report import ClockName, Report, Spread
from hadal.bench.side import SideProcess
from hadal.bench.work import decode_bytes, prefill_flops
from hadal.config import ModelConfig
from hadal.errors import EngineError, InputError

__all__ = [
    "OURS",
    "PEERS",
    "OurName",
    "PeerName",
    "Samples",
    "StoppedError",
    "measure",
    "run_prompt",
]

PeerName = Literal["transformers-fp32", "transformers-bf16"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)
OurName = Literal["hadal-fp32", "hadal-bf16", "hadal-fp4"]
OURS: tuple[OurName, ...] = get_args(OurName)

_LLAMA_CPP = "llama.cpp"
_ABOUT_LLAMA_CPP = (
    "llama.cpp multiplies 4-bit experts with 8-bit activations, keeps keys in float16 and all else in float32: "
    "a comparison of speed, not of the same arithmetic; its limit of a prompt is taken as that of float32"
)
_GOALS = (
    "goals, W1: BF16 2, 3 and 5 times the best peer at 2k, 8k and 32k, and 32k at 0.85 of the speed at 2k; "
    "W2: as llama.cpp stores experts, faster than it at every length, 6, 6 and 7 ms a token, BF16 7 ms at any; "
    "W3: 128k in less than 2,000 MB over the weights, 1,300 tokens/s, 10 ms a token",
    "the limit of a prompt is its fewest FLOPs at the rate of a large product in the same format (in float32, if "
    "this processor is slower in BF16); "
    "that of a token is the active weights and what it looks at of the cache, once, at the speed of "
    "a copy",
    "memory is the growth of the process over weights, libraries and a warm-up of 256 tokens",
)


@dataclass
class Samples:
    """What one side did at one length, round by round."""

    prefill_s: list[float] = field(default_factory=list[float])
    decode_ms: list[float] = field(default_factory=list[float])
    peak_mb: list[float] = field(default_factory=list[float])
    planned_mb: float | None = None
    tokens: list[list[int]] = field(default_factory=list[list[int]])


@dataclass(frozen=True)
class _Format:
    """In which numbers a side computes and what it reads."""

    bits: int
    expert_bits: float | None = None
    fp8_bits: float | None = None


_FORMATS: Mapping[str, _Format] = {
    "hadal-fp32": _Format(32),
    "hadal-bf16": _Format(16),
    "hadal-fp4": _Format(16, expert_bits=4.25, fp8_bits=8.0),
    "transformers-fp32": _Format(32),
    "transformers-bf16": _Format(16),
    _LLAMA_CPP: _Format(32, expert_bits=4.25),
}


class StoppedError(Exception):
    """A side would take too long."""


def measure(
    name: NetworkName,
    lengths: Sequence[int],
    new: int,
    rounds: int,
    *,
    ours: Sequence[OurName] = ("hadal-fp32",),
    peers: Sequence[PeerName] = PEERS,
    peer_limit_s: float = 600.0,
    transformers: Path | None = None,
    llama_cpp: Path | None = None,
    clock: ClockName = "wall",
) -> Report:
    """Compute a prompt of each length and decode after it, in turn with the peers.

    Args:
        name: Which random network.
        lengths: Tokens of the prompts.
        new: Tokens to decode after each.
        rounds: Repetitions, in turn.
        ours: Which of our own forms to run.
        peers: Which to run.
        peer_limit_s: Seconds of a prompt beyond which a peer is stopped.
        transformers: Python of an environment with transformers, if another than this.
        llama_cpp: Python of an environment with llama-cpp-python, to run it too.
        clock: Of all figures; the limit of a peer is always in wall time.

    Raises:
        InputError: No length, or fewer than two tokens to decode.
        EngineError: Our own side ended; a peer that does is named in a note.
    """
    if not lengths or min(lengths) < 1 or new < 2 or not ours:
        raise InputError("context: expected at least one length, two tokens to decode, and a form")
    config = NETWORKS[name]
    shown = ", ".join(f"{length:,}" for length in sorted(lengths))
    report = Report(
        f"W1-W3 context: {name}, prompts of {shown} tokens, {new} decoded, batch 1, {clock} time"
    )
    measured = LimitsOfRounds()
    found: dict[int, dict[str, Samples]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hadal-bench-")))
        write_network(name, folder, _files([*ours, *peers], llama_cpp is not None))
        sides = {form: _start(stack, form, folder, None) for form in ours}
        sides |= {peer: _start(stack, peer, folder, transformers) for peer in peers}
        if llama_cpp is not None:
            sides[_LLAMA_CPP] = llama_cpp_peer.start(stack, llama_cpp, folder / "gguf")
        for side_name, side in sides.items():
            side.wait_ready()
            _tell(f"{side_name} is ready")
        if llama_cpp is not None:
            for figure, value in llama_cpp_peer.agreement(sides[_LLAMA_CPP], name).items():
                report.figures[f"llama.cpp beside hadal, experts alike: {figure}"] = value
        for length in sorted(lengths):
            found[length] = {}
            for number in range(rounds):
                measured.add(Limits.measured(clock))
                ids = _prompt(config, length, number)
                _round(sides, ids, new, peer_limit_s, clock, found[length], report)
    for limit, spread in measured.spreads().items():
        report.figures[f"limit: {limit}"] = spread
    for length, samples in found.items():
        _describe(report, config, length, samples, measured.median)
    report.notes += _GOALS
    report.notes.append(llama_cpp_peer.HOW_TO_GET_IT if llama_cpp is None else _ABOUT_LLAMA_CPP)
    return report


def _files(sides: Sequence[str], llama_cpp: bool) -> list[FileKind]:
    """Return the files that sides load."""
    found = list[FileKind]()
    if {"hadal-fp32", "hadal-bf16"} & set(sides):
        found.append("official")
    if "hadal-fp4" in sides:
        found.append("stored")
    if set(PEERS) & set(sides):
        found.append("huggingface")
    return [*found, "gguf"] if llama_cpp else found


def _start(stack: ExitStack, kind: str, folder: Path, python: Path | None) -> SideProcess:
    command = [str(python or sys.executable), "-m", "hadal.bench.context_sides", kind, str(folder)]
    source = {} if python is None else {"PYTHONPATH": str(Path(hadal.__file__).parents[1])}
    return stack.enter_context(SideProcess([*command, str(torch.get_num_threads())], source))


def _prompt(config: ModelConfig, length: int, number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(2, config.vocab_size) for _ in range(length)]


def _round(
    sides: dict[str, SideProcess],
    ids: list[int],
    new: int,
    limit_s: float,
    clock: ClockName,
    found: dict[str, Samples],
    report: Report,
) -> None:
    """Give every side its turn; a peer that fails or is too slow takes no more part."""
    for name in list(sides):
        samples = found.setdefault(name, Samples())
        try:
            run_prompt(sides[name], ids, new, None if name in OURS else limit_s, samples, clock)
            _tell(f"{len(ids):,} tokens, {name}: {_last(samples, len(ids))}")
        except (StoppedError, EngineError) as err:
            if name in OURS:
                raise
            if not samples.prefill_s:
                del found[name]
            report.notes.append(f"{name} at {len(ids):,} tokens and beyond: {err}")
            sides.pop(name).close()


def run_prompt(
    side: SideProcess,
    ids: list[int],
    new: int,
    limit_s: float | None,
    samples: Samples,
    clock: ClockName = "wall",
) -> None:
    """Compute one prompt and decode after it.

    Raises:
        StoppedError: It would take longer than the limit, as far as could be seen.
        EngineError: The process ended.
    """
    planned = side.ask({"start": ids, "new": new}).get("planned")
    samples.planned_mb = planned / 1e6 if planned is not None else None
    seconds, spent, step = 0.0, 0.0, dict[str, Any](done=0, token=None)
    while step["token"] is None:
        before = step["done"]
        step = side.ask({"step": None})
        seconds += step["wall"]
        spent += step[clock]
        # Chunks only get slower, so the rest takes at least as long as the last one did.
        least = seconds + step["wall"] * (len(ids) - step["done"]) / (step["done"] - before)
        if limit_s is not None and least > limit_s:
            raise StoppedError(
                f"stopped after {step['done']:,} of them in {seconds:.0f} s: all would take at "
                f"least {least:.0f} s, more than the limit of {limit_s:.0f}"
            )
    tokens, decode = [step["token"]], list[float]()
    while len(tokens) < new:
        step = side.ask({"step": None})
        decode.append(1e3 * step[clock])
        tokens.append(step["token"])
    samples.prefill_s.append(spent)
    samples.decode_ms.append(Spread.of(decode).median)
    samples.peak_mb.append(step["peak"] / 1e6)
    samples.tokens.append(tokens)


def _describe(
    report: Report,
    config: ModelConfig,
    length: int,
    found: dict[str, Samples],
    limits: Limits,
) -> None:
    """Add the figures of one length."""
    flops = prefill_flops(config, length)
    own = {name: samples for name, samples in found.items() if name in OURS}
    for name, samples in found.items():
        form, at = _FORMATS[name], f"{length:,}: {name}"
        fastest = max(limits.bf16_gflops, limits.fp32_gflops)
        gflops = fastest if form.bits == 16 else limits.fp32_gflops
        read = decode_bytes(
            config, length, bits=form.bits, expert_bits=form.expert_bits, fp8_bits=form.fp8_bits
        )
        speed = Spread.of([length / s for s in samples.prefill_s])
        decode = Spread.of(samples.decode_ms)
        report.figures |= {
            f"{at}: prefill, tokens/s": speed,
            f"{at}: prefill, share of limit": flops / length * speed.median / gflops / 1e9,
            f"{at}: decode, ms a token": decode,
            f"{at}: decode, share of limit": read / limits.copy_gbps / 1e6 / decode.median,
            f"{at}: memory over the weights, MB": max(samples.peak_mb),
        }
        if samples.planned_mb is not None:
            report.figures[f"{at}: of it planned, MB"] = samples.planned_mb
        if name in own:
            continue
        for ours, mine in own.items():
            report.figures |= {
                f"{length:,}: {ours} over {name}: prefill speed": _ratios(
                    samples.prefill_s, mine.prefill_s
                ),
                f"{length:,}: {ours} over {name}: decode time": _ratios(
                    mine.decode_ms, samples.decode_ms
                ),
            }
        exact = own.get("hadal-fp32")
        if name.startswith("transformers") and exact is not None:
            report.figures[f"{at}: greedy tokens equal to hadal-fp32's"] = _agreement(
                exact.tokens, samples.tokens
            )


def _tell(what: str) -> None:
    """Say how far it is; on the other stream than the report."""
    sys.stderr.write(what + "\n")
    sys.stderr.flush()


def _last(samples: Samples, length: int) -> str:
    """Return what a side has just done."""
    speed = length / samples.prefill_s[-1]
    return f"{speed:,.0f} tokens/s, {samples.decode_ms[-1]:.1f} ms a token"


def _ratios(above: list[float], below: list[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(above, below, strict=False)])


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Return how many tokens are equal before the first that differs, all rounds together.

    What comes after a token that differs continues another text and says nothing.
    """
    same = 0
    for a, b in zip(ours, theirs, strict=False):
        differs = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        same += next(differs, len(a))
    return f"{same} of {sum(map(len, theirs))}"
